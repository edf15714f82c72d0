"""One batch whose rows use different adapters: model(..., adapter_names=["law", None, "med"]), None being the base.

    y = base(x)                                   once, for the whole batch
    y[rows of law] += s · (x[rows of law] A^T) B^T    once for each adapter, not for each row

Each row comes out as it would alone. The keyword belongs to the model's own forward although transformers' classes do
not know it: a hook before the forward takes it out and says to the layers' shared Selection which rows are whose, a
hook after it, which runs on errors too, takes that back. generate() refuses keywords that its model does not know, and
calls the forward many times; so the model gets a `generate` of its own that takes the same keyword. Where a search
repeats each row (beams, num_return_sequences), the names are repeated with it.

Training works through it for the adapters that are active as well (their weights require gradients), not with gradient
checkpointing: that runs layers again after the forward has ended.

Not chosen: the keyword as an attribute to set before the call, which one can forget to unset; a wrapper class around
the model, as in PEFT, which everything else would have to see through.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.adapters.selection import Rows, Selection, selection_of
from qgraft.errors import OptionError, UnsupportedError

KEYWORD = "adapter_names"
_HOOKS = "_adapter_names_hooks"


def accept_rows(model: nn.Module) -> None:
    """Let the model's forward, and its generate() if it has one, take `adapter_names`. Once is enough."""
    if _HOOKS in vars(model):
        return
    before = model.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)  # before a prefix's
    after = model.register_forward_hook(_leave, always_call=True)
    setattr(model, _HOOKS, (before, after))
    if hasattr(model, "generate") and "generate" not in vars(model):
        model.generate = _Generate(model)  # type: ignore[assignment]


def refuse_rows(model: nn.Module) -> None:
    """Undo accept_rows."""
    for hook in vars(model).pop(_HOOKS, ()):
        hook.remove()
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
        with selection.generating(names):
            return generate(model, inputs, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Generate, (self._model(),)  # a copy of the model gets one that points to the copy


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before the forward: tell the layers which rows are whose."""
    selection = selection_of(model)
    if selection.rows is not None and selection.rows.entrance is not model:
        return None  # within the forward of a model that this one is a part of
    selection.rows = None  # torch runs no hook after a KeyboardInterrupt
    rest = {key: value for key, value in kwargs.items() if key != KEYWORD}
    wanted = kwargs.get(KEYWORD)
    if wanted is None and selection.row_names is None:
        return args, rest
    inputs = _batch_of(args, kwargs)
    if wanted is None:
        names = _repeated(selection.row_names or (), inputs.shape[0])
    else:
        names = _checked(wanted, inputs.shape[0], selection)
    if model.training and torch.is_grad_enabled() and _is_checkpointed(model):
        raise UnsupportedError(
            f"{KEYWORD} with gradient checkpointing: the layers run again when the rows are forgotten",
            hint="train without gradient_checkpointing, or one adapter at a time",
        )
    dims = inputs.dim() if inputs.is_floating_point() else inputs.dim() + 1
    selection.rows = Rows(model, len(names), dims, _groups(names, inputs.device))
    return args, rest


def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After the forward, or what became of it: the layers go by the active adapters again."""
    selection = selection_of(model)
    if selection.rows is not None and selection.rows.entrance is model:
        selection.rows = None


def _batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor whose first dimension is the batch."""
    candidates = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("inputs"), *args[:1]]
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
    selection.require(dict.fromkeys(name for name in names if name is not None))
    return tuple(names)


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
