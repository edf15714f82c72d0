"""`model.qgraft`: the one object with all that a model has beside its modules.

A model from `load` has one, any other gets its own when it is first asked for (`base_of`). The class is here, in the lowest
room that needs it; those above put into its fields what is theirs, and adapters look at `selection` alone.

Adapters may also be put on a part of a model, or on a model that is a part of a larger one. All in one tree then share one
selection, whose adapters have their paths from the module that they were put on last, or from a larger one; each module
through which adapters are asked for has a Base of its own, which says where it stands below that one (`stem`).
"""

import copy
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from qgraft.adapters.adapter import Adapter, Part, join, prefix_error
from qgraft.adapters.holder import Holder, modules_outside_adapters
from qgraft.adapters.selection import Selection
from qgraft.errors import AdapterError, OptionError
from qgraft.given import described
from qgraft.model_parts import decoder_of

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

ATTRIBUTE = "qgraft"  # of the model
_ATTACHING = threading.RLock()  # held while adapters are put on models and taken off


@dataclass(frozen=True)
class BaseInfo:
    """Where a model came from.

    Attributes:
        source: the path or hub id that was loaded.
        container: "gguf" or "folder".
        architecture: transformers' model_type.
        fingerprint: says which base this is, whatever its path; see checkpoints/fingerprint.py.
        formats: number of weights in each format, for example {"q4_1": 106168320}.
        notes: what a reader should know about this load, each one sentence.
        sampling: how the files would have answers drawn, by a server's names: {"temperature": 0.7, "top_p": 0.8}.
    """

    source: str
    container: str
    architecture: str
    fingerprint: str
    formats: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sampling: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Base:
    """What a model has beside its modules.

    Attributes:
        info: where its weights came from and what they are; None for a model that `load` did not make.
        origin: the way back into its container (checkpoints/origin.py); None as above.
        tokenizer: the one that was loaded with it, if any.
        processor: what makes numbers of images, of a model that sees some (checkpoints/folder_processor.py).
        tokens: those that it got beyond the base's, by their texts (data/new_tokens.py).
        merged: what merges took away, to be put back (merging/merge.py); None where nothing is merged.
        selection: its adapters, and which of them are active.
        stem: the module's path below the one that the paths of the adapters begin at.
        hooks: where calls of the module begin and end (batch_rows.py), while there are adapters.
    """

    info: BaseInfo | None = None
    origin: Any = None
    tokenizer: Any = None
    processor: Any = None
    tokens: dict[str, Any] = field(default_factory=dict)
    merged: Any = None
    selection: Selection = field(default_factory=Selection)
    stem: str = ""
    hooks: tuple[RemovableHandle, ...] = ()

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The attached adapters by name, each with the parts that are in this model."""
        with _ATTACHING:
            return {name: adapter.within(self.stem) for name, adapter in self.selection.adapters.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Base":
        """Of a copy of the model: adapters of its own; all else is never changed, so it is shared."""
        selection, hooks = copy.deepcopy((self.selection, self.hooks), memo)
        return replace(self, selection=selection, hooks=hooks)


def require_model(model: Any) -> None:
    """Raise OptionError where this is no model, but for example where one would be loaded from."""
    if isinstance(model, nn.Module):
        return
    hint = "model, tokenizer = qgraft.load('model.gguf')"
    if isinstance(model, str | os.PathLike):
        hint = f"model, tokenizer = qgraft.load({os.fspath(model)!r})"
    raise OptionError(f"model: got {described(model)}, expected a model", hint=hint)


def base_of(model: nn.Module) -> Base:
    """`model.qgraft`; a new one where the model has none. Raises OptionError for what is no model."""
    require_model(model)
    base = vars(model).get(ATTRIBUTE) or vars(model).setdefault(ATTRIBUTE, Base())
    assert isinstance(base, Base)
    return base


def entrances(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that calls enter the model by: itself and its decoder."""
    decoder = decoder_of(model)
    return (model,) if decoder is model else (model, decoder)


def one_at_a_time(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let threads wait for each other in a function that puts adapters on a model or takes them off."""

    @wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with _ATTACHING:
            return function(*args, **kwargs)

    return wrapper


def selection_of(model: nn.Module) -> Selection:
    """The selection that all adapters in the model share."""
    base = base_of(model)
    return base.selection if base.selection.adapters else gather(model).selection


@one_at_a_time
def gather(model: nn.Module) -> Base:
    """The model's Base, after a look at its parts: those that got adapters by themselves share its selection from now on."""
    base, *_ = (base_of(module) for module in entrances(model))
    inside = list(modules_outside_adapters(model))
    _refuse_peft(inside)
    holders = [(path, module) for path, module in inside if isinstance(module, Holder)]
    others = [(path, holder) for path, holder in holders if holder.selection is not base.selection]
    known = base.selection.adapters
    if others and not known:
        base.selection, base.stem = others[0][1].selection, _stem(*others[0])
        if base.stem:  # the model is a part of a larger one, which has put adapters on it
            known = base.selection.adapters
            others = [(path, holder) for path, holder in others if holder.selection is not base.selection]
    if others:
        weights = {name: weight for _, holder in others for name, weight in holder.selection.weights.items()}
        base.selection.adapters = _united(known, others, base.stem)
        base.selection.weights = weights | base.selection.weights
    for path, module in inside:
        if isinstance(module, Holder):
            module.selection = base.selection
        own = vars(module).get(ATTRIBUTE)
        if isinstance(own, Base) and own is not base:
            own.selection, own.stem = base.selection, join(base.stem, path)
    return base


def _refuse_peft(inside: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise AdapterError where PEFT has put its layers around the model's: ours would miss its LoRAs."""
    wrapped = next((path for path, module in inside if hasattr(type(module), "adapter_layer_names")), None)
    if wrapped is not None:
        raise AdapterError(
            f"{wrapped}: the model carries adapters of PEFT's, which only PEFT can use",
            hint="model.save_pretrained('adapter'); model = model.unload(); qgraft.load_adapter(model, 'adapter')",
        )


def _stem(path: str, holder: Holder) -> str:
    """Where a model, in which the holder is at `path`, stands below the one that the holder's adapters have paths from."""
    held = set(holder.held.values())
    adapters = holder.selection.adapters.values()
    at = next((at for adapter in adapters for at, part in adapter.parts.items() if part in held), "")
    return at.removesuffix(path).removesuffix(".") if f".{at}".endswith(path and f".{path}") else ""


def _united(known: Mapping[str, Adapter], others: Sequence[tuple[str, Holder]], stem: str) -> dict[str, Adapter]:
    """These adapters, and those of parts of a model that had a selection of their own."""
    adapters = dict(known)
    for _, holder in others:
        for name, adapter in holder.selection.adapters.items():
            adapters.setdefault(name, replace(adapter, parts={}))
    for path, holder in others:
        for name, part in holder.held.items():
            assert isinstance(part, Part)
            own = adapters.get(name) or Adapter(name, part.kind, {})
            adapters[name] = replace(own, parts={**own.parts, join(stem, path): part})
    return {name: adapter for name, adapter in adapters.items() if adapter.parts}


def adapter_names(model: nn.Module) -> list[str]:
    """The attached adapters, in the order they were attached."""
    return list(selection_of(model).adapters)


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The attached adapters by name, in the order they were attached, each with the parts that are in this model."""
    selection_of(model)
    return base_of(model).adapters


def find_adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """The attached adapter `name`; without a name the only one. Raises AdapterError where there is none."""
    attached = adapters_of(model)
    if name is None and len(attached) != 1:
        listed = ", ".join(attached) or "none"
        raise AdapterError(f"which adapter? attached: {listed}", hint="give name= (attach one first if there is none)")
    name = next(iter(attached)) if name is None else name
    selection_of(model).require([name])
    return attached[name]


def require_loras(model: nn.Module, names: Iterable[str], action: str) -> None:
    """Raise AdapterError when one of the attached adapters `names` is a prefix, which `action` cannot take."""
    adapters = selection_of(model).adapters
    if prefixes := [name for name in names if name in adapters and adapters[name].is_prefix]:
        raise prefix_error(action, prefixes)


def alone(doing: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Let a function whose first argument is the `model` take it for its thread; see Selection.taken."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @wraps(function)
        def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            model: Any = args[0] if args else kwargs["model"]
            with selection_of(model).taken(doing):
                return function(*args, **kwargs)

        return wrapper

    return decorate
