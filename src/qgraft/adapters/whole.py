"""A module that an adapter has a copy of and trains whole, beside its LoRAs: the head of a classifier.

    x -> head of the base          where no active adapter has one
      -> the adapter's own copy    where one has: float32, trained as a whole, stored as PEFT's `modules_to_save` are

Two heads have no sum: PEFT lets one adapter at a time be active that has copies, and so does use_adapter(); rows of a
batch may each have their own. What comes out has the dtype of what went in.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.adapters.adapter import Adapter, Part
from qgraft.adapters.holder import Holder, set_module
from qgraft.adapters.peft_names import whole_name
from qgraft.adapters.selection import Selection
from qgraft.errors import AdapterError, UnsupportedError


class WholeModule(Part):
    """An adapter's copy of a module of the base, in float32."""

    kind = "lora"
    config = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).float()

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See Part."""
        return {whole_name(path, leaf): tensor.detach() for leaf, tensor in self.module.state_dict().items()}

    def computed(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the copy makes of these inputs, in their dtype."""
        given = next((each for each in inputs if isinstance(each, Tensor)), None)
        if given is None or given.dtype == torch.float32 or not given.is_floating_point():
            return self.module(*inputs, **options)
        wide = (each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs)
        y = self.module(*wide, **options)
        return y.to(given.dtype) if isinstance(y, Tensor) else y


class WholeHolder(Holder):
    """In the place of a module of the base, of which adapters have copies.

    Args:
        base: the module, frozen from now on.
        selection: that of the model, which says what is active.
    """

    def __init__(self, base: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.base, self.copies, self.selection = base, nn.ModuleDict(), selection
        base.requires_grad_(False)

    @property
    def held(self) -> nn.ModuleDict:
        """See Holder."""
        return self.copies

    def add(self, name: str, part: Part) -> None:
        """See Holder."""
        device = next(self.base.parameters()).device
        self.copies[name] = part.to(device).train(self.training)

    def take_away(self, model: nn.Module, path: str) -> None:
        """See Holder."""
        set_module(model, path, self.base)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the active adapter's copy makes of it, or the base's module where none has one."""
        active = self.selection.now()
        if active.rows is not None and active.uniform is None:
            return self._row_by_row(*inputs, **options)
        copies = [part for name in active.uniform or {} if (part := self.named(name)) is not None]
        if len(copies) > 1:
            raise AdapterError("several active adapters have a head of their own, and heads have no sum",
                               hint="use_adapter(model, name) chooses one")  # fmt: skip
        return copies[0].computed(inputs, options) if copies else self.base(*inputs, **options)

    def named(self, name: str) -> WholeModule | None:
        """The copy of this adapter, in one look: another thread may be taking it off."""
        part = self.copies._modules.get(name)
        assert part is None or isinstance(part, WholeModule)
        return part

    def _row_by_row(self, x: Tensor, *inputs: Any, **options: Any) -> Tensor:
        """The base for the whole batch at once, then each adapter's copy for its own rows."""
        rows, y = self.selection.now().rows, self.base(x, *inputs, **options)
        assert rows is not None
        for name, index in rows.groups:
            if (part := self.named(name)) is not None:
                y = y.index_copy(0, index, part.computed((x.index_select(0, index), *inputs), options).to(y.dtype))
        return y


def whole_modules(adapter: Adapter) -> dict[str, WholeModule]:
    """The modules that the adapter trains whole, by their paths."""
    return {path: part for path, part in adapter.parts.items() if isinstance(part, WholeModule)}


def refuse_whole(adapter: Adapter, action: str) -> None:
    """Raise UnsupportedError for an adapter with a head, which `action` would lose."""
    if found := list(whole_modules(adapter)):
        raise UnsupportedError(f"{action}: {adapter.name!r} has a head of its own ({', '.join(found)}), which would be lost",
                               hint="it is kept by save_adapter(), and by merge() and save() into a folder")  # fmt: skip


def put_whole(model: nn.Module, path: str, selection: Selection) -> WholeHolder:
    """The holder at `path`, put there around the base's module if it is not yet. Raises UnsupportedError for LoRAs in it."""
    module = model.get_submodule(path)
    if isinstance(module, WholeHolder):
        return module
    check_free(module, path)
    holder = WholeHolder(module, selection).train(module.training)
    set_module(model, path, holder)
    return holder


def check_free(module: nn.Module, path: str) -> None:
    """Raise UnsupportedError where another adapter has LoRAs in the module at `path`."""
    if not isinstance(module, WholeHolder) and any(isinstance(each, Holder) for each in module.modules()):
        raise UnsupportedError(f"{path}: one adapter trains it whole, and another one on the model has a LoRA in it",
                               hint="take the other one off, or load it on another copy of the model")  # fmt: skip


def has_whole(adapters: Iterable[Adapter]) -> list[str]:
    """The names of those that have a head."""
    return [adapter.name for adapter in adapters if whole_modules(adapter)]
