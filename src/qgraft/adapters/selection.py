"""What is active on a model: one Selection that the modules of all its adapters share, whatever their kind.

A switch therefore sets one dict and touches no module. The modules that share it hold it as their attribute
`selection`: every LoraLinear (lora.py), and the Prefixes of the base model (prefix.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from qgraft.errors import AdapterError, UnsupportedError, near_match


@dataclass(frozen=True, eq=False)
class Rows:
    """Which adapter serves which rows of one batch.

    Attributes:
        entrance: the module that was called with the batch.
        batch: how many rows there are.
        dims: dimensions of a layer's input: one more than token ids have.
        groups: (adapter, its rows, int64); a row in none of them is the base's.
    """

    entrance: nn.Module
    batch: int
    dims: int
    groups: tuple[tuple[str, Tensor], ...]

    @property
    def uniform(self) -> bool:
        """Whether one adapter, or none, serves the whole batch."""
        return all(len(index) == self.batch for _, index in self.groups)

    def check(self, x: Tensor) -> None:
        """Raise UnsupportedError for a layer's input in which the rows of the batch cannot be told apart."""
        if x.shape[0] != self.batch or x.dim() != self.dims:
            raise UnsupportedError(
                f"adapter_names: a layer got an input {list(x.shape)}, expected {self.batch} rows in {self.dims} dimensions",
                hint="this architecture mixes the rows of a batch; answer one adapter's rows at a time, with use_adapter",
            )


@dataclass(eq=False)
class Selection:
    """What the adapters of one model add to the base now.

    Attributes:
        parts: the modules of every attached adapter, under its name, in the order of attaching.
        weights: the active adapters and their weights.
        rows: where set, it stands in for `weights`: each row of the present batch has its own adapter.
        serve: where set, it stands in for both: layer, input -> output (segments.py, while several jobs train).
        row_names: the adapters of the rows that generate() was called with, while it runs.
        evaluated: while generate() runs, the keys and values of the prefixes that were computed in it.
    """

    parts: dict[str, list[nn.Module]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    rows: Rows | None = None
    serve: Callable[[Any, Tensor], Tensor] | None = None
    row_names: tuple[str | None, ...] | None = None
    evaluated: dict[str, Tensor] | None = None

    def require(self, names: Iterable[str]) -> None:
        """Raise AdapterError when one of these names is not attached."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            raise AdapterError(
                f"no adapter named {', '.join(map(repr, missing))}; attached: {', '.join(self.parts) or 'none'}",
                hint=near_match(missing[0], self.parts),
            )

    def add(self, name: str, part: nn.Module) -> None:
        """Put one more module of the adapter `name` on the list."""
        self.parts.setdefault(name, []).append(part)

    def forget(self, name: str, gone: nn.Module) -> None:
        """Strike one module of an adapter off the list, and the adapter with its last one."""
        self.parts[name] = [part for part in self.parts[name] if part is not gone]
        if not self.parts[name]:
            del self.parts[name]
            self.weights.pop(name, None)

    def choose(self, weights: Mapping[str, float]) -> None:
        """Make these adapters active: they train from now on, those that were active do not."""
        for name in self.weights.keys() | weights.keys():
            for part in self.parts.get(name, ()):
                # half a millisecond faster than part.requires_grad_(), for a LoRA
                parameters = part.parameters() if part._modules else part._parameters.values()
                for parameter in parameters:
                    cast(Tensor, parameter).requires_grad = name in weights
        self.weights = dict(weights)

    @contextmanager
    def generating(self, row_names: tuple[str | None, ...] | None) -> Iterator[None]:
        """Within the block generate() runs; no parameter changes."""
        self.row_names, self.evaluated = row_names, {}
        try:
            yield
        finally:
            self.row_names = self.evaluated = None


def selection_of(model: nn.Module) -> Selection:
    """The selection that the model's adapters share; a new one where it has none."""
    held = (vars(module).get("selection") for module in model.modules())
    return next((selection for selection in held if isinstance(selection, Selection)), Selection())
