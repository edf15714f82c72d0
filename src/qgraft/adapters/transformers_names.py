"""What transformers and PEFT call the things that are done to adapters, on models of ours.

`PreTrainedModel` has methods for PEFT's adapters (set_adapter, disable_adapters, ...), which know nothing of ours, say so in
words that mislead ("No adapter loaded" with three on the model), or wrap layers that they cannot read. On a model that `load`
made they do what their names say, with our adapters, or name the function that does. They are attributes of the one model:
transformers itself is left as it is. `load_state_dict` likewise: PEFT's names of a LoRA's tensors are not those of the
modules, so with strict=False all of them would be dropped without a word.
"""

import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from qgraft.adapters.attach import detach_adapter
from qgraft.adapters.base import adapter_names, selection_of
from qgraft.adapters.choose import active_adapters, use_adapter
from qgraft.adapters.states import lora_state_dict
from qgraft.errors import AdapterError, UnsupportedError
from qgraft.given import described

_INSTEAD = {  # methods of transformers that need another function of ours
    "load_adapter": "qgraft.load_adapter(model, folder, name)",
    "add_adapter": "qgraft.attach_lora(model, r=8, name=...)",
}


class Method:
    """A method of one model, by its name. It holds the model weakly, so that the model is freed as it was before."""

    def __init__(self, model: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._model, self.name, self._function = weakref.ref(model), name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._model(), *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Method, (
            self._model(),
            self.name,
            self._function,
        )  # a copy of the model gets one that points to the copy


def speak_transformers(model: nn.Module) -> None:
    """Give the model transformers' methods for adapters, with ours behind them."""
    for name, function in _METHODS.items():
        setattr(model, name, Method(model, name, function))
    model.register_load_state_dict_pre_hook(_refuse_lost)


def _names(method: str, given: Any) -> list[str]:
    """One name or several. Raises AdapterError for what is none: no adapter is called None."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        hint = "model.disable_adapters() makes it the base" if method == "set_adapter" else None
        raise AdapterError(f"model.{method}: got {described(given)}, expected the name of an adapter, or a list of them",
                           hint=hint)  # fmt: skip
    return list(names)


def _set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    use_adapter(model, dict.fromkeys(_names("set_adapter", adapter_name), 1.0))


def _disable(model: nn.Module) -> None:
    use_adapter(model, None)


def _enable(model: nn.Module) -> None:
    """The last one that was attached, where none is active."""
    if adapter_names(model) and not active_adapters(model):
        use_adapter(model, adapter_names(model)[-1])


def _active(model: nn.Module) -> list[str]:
    return list(active_adapters(model))


def _delete(model: nn.Module, adapter_names: str | list[str]) -> None:
    for name in _names("delete_adapter", adapter_names):
        detach_adapter(model, name)


def _state_dict(model: nn.Module, adapter_name: str | None = None, **_: Any) -> dict[str, Tensor]:
    return lora_state_dict(model, adapter_name)


def _load(model: nn.Module, *_: Any, **__: Any) -> NoReturn:
    raise _elsewhere("load_adapter")


def _add(model: nn.Module, *_: Any, **__: Any) -> NoReturn:
    raise _elsewhere("add_adapter")


def _elsewhere(name: str) -> UnsupportedError:
    return UnsupportedError(f"model.{name}() puts PEFT's layers on a model, which cannot read packed weights",
                            hint=_INSTEAD[name])  # fmt: skip


_METHODS: dict[str, Callable[..., Any]] = {
    "set_adapter": _set_adapter, "disable_adapters": _disable, "enable_adapters": _enable, "active_adapters": _active,
    "delete_adapter": _delete, "get_adapter_state_dict": _state_dict, "load_adapter": _load, "add_adapter": _add,
}  # fmt: skip


_OF_ADAPTERS = re.compile(r"(^|\.)(lora_|prefix_encoder\.)")  # PEFT's, the tutorials' on ChatGLM, THUDM's


def _refuse_lost(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before load_state_dict: raise AdapterError where it would drop an adapter, or load nothing at all.

    With strict=False torch passes over each name that it does not find.
    """
    given = [key.removeprefix(prefix) for key in state if isinstance(key, str) and key.startswith(prefix)]
    lost = sorted(set(given) - module.state_dict().keys())
    if named := [key for key in lost if _OF_ADAPTERS.search(key)]:
        attached = ", ".join(selection_of(module).adapters) or "none"
        lora = ("qgraft.load_lora_state_dict(model, tensors) puts what lora_state_dict gave into the LoRA that is attached; "
                "qgraft.load_adapter(model, 'lora.pt', lora_alpha=16) attaches one")  # fmt: skip
        prefix_there = any("prefix_encoder." in key for key in named)
        raise AdapterError(
            f"load_state_dict: {named[0]} and {len(named) - 1} more are an adapter's, and no module here is called so; "
            f"adapters on the model: {attached}",
            hint="qgraft.load_adapter(model, folder) attaches a prefix of THUDM's scripts" if prefix_there else lora,
        )
    if lost and len(lost) == len(given):
        raise AdapterError(f"load_state_dict: none of the {len(lost)} names ({lost[0]}, ...) is one of this model's, so "
                           "nothing would be loaded", hint="model.state_dict() shows its names")  # fmt: skip
