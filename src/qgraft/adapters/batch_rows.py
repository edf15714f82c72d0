"""A call of a model: what it goes by from its beginning to its end, and another adapter for each row of its batch.

    model(..., adapter_names=["law", None, "med"])      None (or PEFT's "__base__") is the base

    y = base(x)                                   once, for the whole batch
    y[rows of law] += s · (x[rows of law] A^T) B^T    once for each adapter, not for each row

Each row comes out as it would alone. The keyword belongs to the model's own forward although transformers' classes do
not know it: a hook before the forward takes it out and lets a call begin (selection.py), to which the layers look for
what is active; a hook after it lets the call end. A decoder that is called without its output layer, as in training,
takes calls as well. generate() refuses keywords that its model does not know, and calls the forward many times, which
must all go by the same; so the model gets a `generate` of its own, which is one call around these. Where a search
repeats each row (beams, num_return_sequences), the names are repeated with it.

Training works through `adapter_names` for the adapters that are active as well (their weights require gradients), not
with gradient checkpointing: that runs layers again after the call has ended.

Not chosen: the keyword as an attribute to set before the call, which one can forget to unset; a wrapper class around
the model, as in PEFT, which everything else would have to see through; a forward of the model's own in the place of the
hooks, which would also see Ctrl-C: accelerate's hooks and its mixed precision put theirs there and take it away again.
"""

import inspect
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.adapters.base import base_of, entrances, selection_of
from qgraft.adapters.selection import BatchRows, Selection, end
from qgraft.errors import OptionError, UnsupportedError
from qgraft.rotary import by_call

KEYWORD = "adapter_names"
_BATCHED = ("input_ids", "inputs_embeds", "input_features", "inputs")
BASE = "__base__"  # PEFT's word for no adapter
# Models of transformers that keep what they know of a sequence in their modules, not in a cache.
_KEEP_STATE = {"moshi", "recurrent_gemma", "reformer", "rwkv"}


def accept_rows(model: nn.Module) -> None:
    """Let calls of the model, and of its decoder, be told apart and take `adapter_names`. Once is enough."""
    if not base_of(model).hooks:  # once a model, not once an adapter
        by_call(model)
    for module in entrances(model):
        if not base_of(module).hooks:
            before = module.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)  # before a prefix's
            after = module.register_forward_hook(_leave, always_call=True)
            base_of(module).hooks = (before, after)
    if hasattr(model, "generate") and "generate" not in vars(model):
        model.generate = _Generate(model)  # type: ignore[assignment]


def refuse_rows(model: nn.Module) -> None:
    """Undo accept_rows."""
    for module in entrances(model):
        for hook in base_of(module).hooks:
            hook.remove()
        base_of(module).hooks = ()
    if isinstance(vars(model).get("generate"), _Generate):
        del model.generate


class _Generate:
    """model.generate with `adapter_names`. It holds the model weakly, so that the model is freed as it was before."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(
        self, inputs: Any = None, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        model: Any = self._model()
        generate = type(model).generate
        selection, names = selection_of(model), None
        if adapter_names is not None:
            names = _checked(adapter_names, _batch_of((inputs,), kwargs).shape[0], selection)
        call = selection.within(inspect.currentframe(), row_names=names, evaluated={})  # no parameter changes in it
        with _alone_if_needed(model, selection, kwargs), call:
            # by its place: Whisper calls the first input_features
            return generate(model, *(() if inputs is None and not args else (inputs, *args)), **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Generate, (self._model(),)  # a copy of the model gets one that points to the copy


def _alone_if_needed(model: Any, selection: Selection, options: Mapping[str, Any]) -> Any:
    """The model taken for this thread where generate() keeps something in it: another call would mix it up."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _KEEP_STATE or any(
        "rope_deltas" in vars(module) for module in entrances(model)
    ):  # positions of pictures, counted on from the prompt
        return selection.taken("used for an answer whose state it keeps in its layers")
    if options.get("assistant_early_exit") is not None:  # which leaves layers out of the configuration for a while
        return selection.taken("used for an answer with assistant_early_exit")
    return nullcontext()


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before the forward: let a call begin, with the rows that are whose."""
    if vars(model).get("_is_replica"):
        raise UnsupportedError(
            "torch.nn.DataParallel calls its replicas in threads that do not know what is active in the caller's",
            hint="run one process for each GPU",
        )
    selection = selection_of(model)
    around, wanted = selection.now(), kwargs.get(KEYWORD)
    rest = {key: value for key, value in kwargs.items() if key != KEYWORD}
    if wanted is None and around.entrance is not None and around.entrance is not model and around.lasts():
        return args, rest  # within the forward of a model that this one is a part of
    names, rows = None, None
    if wanted is not None:
        names = _checked(wanted, _batch_of(args, kwargs).shape[0], selection)
    elif around.row_names is not None:
        names = _repeated(around.row_names, _batch_of(args, kwargs).shape[0])
    if names is not None:
        rows = _rows_of(model, names, _batch_of(args, kwargs))
    selection.begin(_caller(), entrance=model, rows=rows)
    return args, rest


def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After the forward, or what became of it: the call has ended."""
    end(_caller())


def _caller() -> FrameType:
    """The function of torch that calls hooks and forward; torch.compile puts functions of its own before it."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != torch.nn.modules.module.__file__:
        frame = frame.f_back
    assert frame is not None, "a hook of a model's forward, called by something else than torch"
    return frame


def _rows_of(model: nn.Module, names: Sequence[str | None], inputs: Tensor) -> BatchRows:
    if model.training and torch.is_grad_enabled() and _is_checkpointed(model):
        raise UnsupportedError(
            f"{KEYWORD} with gradient checkpointing: the layers run again when the rows are forgotten",
            hint="train without gradient_checkpointing, or one adapter at a time",
        )
    dims = inputs.dim() if inputs.is_floating_point() else inputs.dim() + 1
    return BatchRows(len(names), dims, _groups(names, inputs.device))


def _batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor whose first dimension is the batch."""
    candidates = [*(kwargs.get(name) for name in _BATCHED), *args[:1]]
    found = next((value for value in candidates if isinstance(value, Tensor) and value.dim()), None)
    if found is None:
        raise OptionError(f"{KEYWORD}: there is no batch; expected input_ids or inputs_embeds with it")
    return found


def _checked(names: Sequence[str | None], batch: int, selection: Selection) -> tuple[str | None, ...]:
    """The names as a tuple, one for each row. Raises OptionError, AdapterError for one that is not attached."""
    if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
        raise OptionError(f"{KEYWORD}={names!r}: expected a list with the name of an adapter, or None, for each row")
    if len(names) != batch:
        raise OptionError(
            f"{KEYWORD}: got {len(names)} names, expected {batch}, one for each row of the batch",
            hint="None stands for the base; a padding-free batch is one row",
        )
    chosen = tuple(None if name == BASE else name for name in names)
    selection.require(dict.fromkeys(name for name in chosen if name is not None))
    return chosen


def _repeated(names: tuple[str | None, ...], batch: int) -> tuple[str | None, ...]:
    """Within generate(): each name as often as its row is repeated, as by repeat_interleave."""
    if batch % len(names):
        raise UnsupportedError(f"{KEYWORD}: this way of generating makes {batch} rows of {len(names)}")
    return tuple(name for name in names for _ in range(batch // len(names)))


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _groups(names: Sequence[str | None], device: torch.device) -> tuple[tuple[str, Tensor], ...]:
    members: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            members.setdefault(name, []).append(row)
    return tuple((name, torch.tensor(rows, device=device)) for name, rows in members.items())
