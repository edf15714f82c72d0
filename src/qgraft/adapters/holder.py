"""The modules of a model that carry parts of adapters: wrapped layers (lora.py) and the prefixes (prefix.py)."""

from collections.abc import Iterator

from torch import nn

from qgraft.adapters.adapter import Part
from qgraft.adapters.selection import Selection


class Holder(nn.Module):
    """A module in the model's tree that computes with the parts of the active adapters.

    Attributes:
        selection: that of the model, which says what is active.
    """

    selection: Selection

    @property
    def held(self) -> nn.ModuleDict:
        """Its parts, each under the name of its adapter."""
        raise NotImplementedError

    def add(self, name: str, part: Part) -> None:
        """Put a part of the adapter `name` here, inactive."""
        raise NotImplementedError

    def drop(self, name: str) -> None:
        """Take the part of the adapter `name` away."""
        del self.held[name]

    def take_away(self, model: nn.Module, path: str) -> None:
        """Leave the model, in which it is at `path`, as it was without it."""
        raise NotImplementedError


def modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules() without what is inside of adapters: of a hundred LoRAs that is 20 000 modules."""
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        if not isinstance(module, Holder):
            stem = f"{path}." if path else ""
            waiting += reversed([(stem + name, child) for name, child in module.named_children()])


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
