"""Rotations whose frequencies depend on the length of the text, of several texts at once.

transformers' "dynamic" and "longrope" keep the frequencies of the text that was last passed through the model in the
module that makes cos and sin of positions: two threads, one with a long text and one with a short one, rotate by each
other's, and a short text after a long one by those of the long one. With `by_call` each call begins from the module as it
was made. The result is that of a model which has just been loaded.
"""

import copy
import weakref
from typing import Any

from torch import nn

_CHANGING = ("dynamic", "longrope")  # in a rope_type


def by_call(model: nn.Module) -> None:
    """Let each call of such a module of the model go by its own text. Once is enough."""
    for module in model.modules():
        if _changes(module) and "forward" not in vars(module):
            module.forward = _ByCall(module)


def by_length(model: nn.Module) -> bool:
    """Whether a token's rotation depends on how long the text is, so that texts in one pass would change each other's."""
    return any(_changes(module) for module in model.modules())


def changes_with(model: nn.Module, length: int) -> bool:
    """Whether a text of this length has other rotations than a short one, and so would change theirs in the same row."""
    return any(_changes(module) and length > _original(module) for module in model.modules())


def _original(module: Any) -> int:
    """The length up to which rotations are those of the module as it was made."""
    stated: dict[str, Any] = module.config.rope_parameters or {}
    lengths = [
        each["original_max_position_embeddings"]
        for each in (stated, *stated.values())
        if isinstance(each, dict) and each.get("original_max_position_embeddings")
    ]
    return int(min(lengths, default=module.original_max_seq_len))


def _changes(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", ())  # with several kinds of layers, one for each
    names = types.values() if isinstance(types, dict) else (types,)
    return any(kind in str(name) for name in names for kind in _CHANGING)


class _ByCall:
    """The forward pass of a copy of a module that is as it was made. It holds the module weakly."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        one = copy.copy(module)
        one._buffers = {name: buffer.clone() for name, buffer in module._buffers.items()}
        for name, buffer in module._buffers.items():
            if name.endswith("original_inv_freq"):
                one._buffers[name.replace("original_inv_freq", "inv_freq")] = buffer.clone()
        for name in [name for name in vars(one) if name.endswith("max_seq_len_cached")]:
            setattr(one, name, module.original_max_seq_len)
        return type(module).forward(one, *args, **kwargs)

    def __reduce__(self) -> Any:
        return _ByCall, (self._module(),)  # a copy of the model gets one that points to the copy
