"""Where the matrices of a loaded model lie in its container, and what goes back there.

`load` leaves an Origin on the model as `model.qgraft.origin`. It holds names and orders, no weights: the model has them.
Little differs between a matrix of the model and the same matrix in its container, and it only moves rows and blocks:

    row order    llama.cpp stores the rows of q and k of llama-like models in another order (gguf_rules.py)
    column order of a matrix that takes in heads in such an order
    transposed   folders keep the float weights of transformers' Conv1D as [in, out] (folder_model.py)

Everything else in a container (metadata, norms, biases, tokenizer) is copied from it when the model is saved. So it must
still be what it was when the model was loaded: `digest` says what that was. It is compared by content, not by date,
because a copied or touched file is the same, and refusing it would cost somebody a merge.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.adapters.base import base_of
from qgraft.adapters.lora import LoraLayer
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.experts import ExpertStack, PackedLayer
from qgraft.formats import PackedTensor, checked, convert, get_format, join_rows, take_columns, take_rows
from qgraft.linear import QuantizedLinear
from qgraft.mapped import release

PANEL_WEIGHTS = 1 << 22  # written at a time: 16 MiB while they are float32


@dataclass(frozen=True, eq=False)
class Stored:
    """How one matrix of the model lies in its container.

    Attributes:
        name: of its tensor there.
        row_order: [out] int64, which stored row is row i of the model; None where they agree.
        column_order: [in] int64, which stored column is column i of the model; None where they agree.
        transposed: whether floats are kept [in, out].
        repeated: the model does not read it, because it is tied to another matrix that it reads.
        number: which one it is of the matrices of a tensor [n, out, in].
        experts: of a stack in a file that is written anew, how many matrices it holds; 0 for a single matrix.
    """

    name: str
    row_order: Tensor | None = None
    column_order: Tensor | None = None
    transposed: bool = False
    repeated: bool = False
    number: int = 0
    experts: int = 0


@dataclass(frozen=True, eq=False)
class Origin:
    """What a loaded model remembers of its container.

    Attributes:
        path: the file or folder; of a model in several files the first.
        container: "gguf" or "folder".
        digest: of everything in it that a save copies; by gguf_digest or folder_digest.
        matrices: module path in the model -> where its weight lies.
        vectors: the parameters that were read as floats (norms, biases), by their names in the model.
        parts: how many files a GGUF model is split over.
        tokens: those that the model has beyond the container's (data.new_tokens.NewToken), whose rows a merge wrote.
        head: of a classifier, the parameters of its head that are in the folder -> their tensors there.
    """

    path: Path
    container: str
    digest: str
    matrices: dict[str, Stored]
    vectors: tuple[str, ...] = ()
    parts: int = 1
    tokens: tuple[Any, ...] = ()
    head: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Container:
    """What a kind of container can hold.

    Attributes:
        kind: what it is called in messages.
        held: the formats that it has a place for.
        experts: those that it has a place for in experts.
        hint: what to do about a matrix in another format.
    """

    kind: str
    held: frozenset[str]
    experts: frozenset[str]
    hint: str


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix to be written: the model's packed weight, and the format that it shall have in the container."""

    path: str
    stored: Stored
    packed: PackedTensor
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        """Bytes it will take; at most, where a part may have several dtypes."""
        return get_format(self.format).nbytes(*self.packed.shape)

    def panels(self) -> Iterator[PackedTensor]:
        """The matrix in its container's row order and in `format`, on the CPU, some rows at a time."""
        rows, width = self.packed.shape
        by_rows = all(get_format(name).by_rows for name in (self.packed.format, self.format))
        for index in self._order().split(max(1, PANEL_WEIGHTS // width if by_rows else rows)):
            panel = _to_cpu(take_rows(self.packed, index.to(self.packed.device)))
            if self.stored.column_order is not None:
                panel = take_columns(panel, self.stored.column_order.argsort())
            yield self._convert(panel)
        release(*self.packed.parts)

    def whole(self) -> PackedTensor:
        """All panels as one; not copied where nothing has to change."""
        if self.packed.format == self.format and self.stored.row_order is None and self.stored.column_order is None:
            return _to_cpu(self.packed)
        return join_rows(list(self.panels()))

    def _convert(self, panel: PackedTensor) -> PackedTensor:
        try:
            return convert(panel, self.format)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.path}: {error.message}", hint=error.hint) from error

    def _order(self) -> Tensor:
        """Which row of the model is row i of the container, [out] int64: the inverse of `row_order`."""
        order = self.stored.row_order
        return torch.arange(self.packed.shape[0]) if order is None else order.argsort()


@dataclass(frozen=True, eq=False)
class Slices:
    """Matrices that are one tensor [n, out, in] of the container, in its order."""

    matrices: list[Matrix]

    @property
    def format(self) -> str:
        """The one that all of them have. Raises CheckpointError where they have several."""
        if len(formats := {each.format for each in self.matrices}) > 1:
            named = ", ".join(each.path for each in self.matrices)
            raise CheckpointError(
                f"{named}: got the formats {', '.join(sorted(formats))}, expected one: they are one tensor"
            )
        return self.matrices[0].format

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, out, in)."""
        return (len(self.matrices), *self.matrices[0].shape)

    def panels(self) -> Iterator[PackedTensor]:
        """See Matrix."""
        for each in self.matrices:
            yield from each.panels()

    def whole(self) -> PackedTensor:
        """See Matrix; [n * out, in]."""
        return join_rows([each.whole() for each in self.matrices])


def by_tensor(matrices: Sequence[Matrix]) -> dict[str, Matrix | Slices]:
    """What each tensor of the container is made of, by its name."""
    found: dict[str, list[Matrix]] = {}
    for each in matrices:
        found.setdefault(each.stored.name, []).append(each)
    return {
        name: some[0] if len(some) == 1 else Slices(sorted(some, key=lambda each: each.stored.number))
        for name, some in found.items()
    }


def find_origin(model: nn.Module) -> Origin:
    """Where `model` came from. Raises CheckpointError for a model that no `load` made."""
    origin = base_of(model).origin
    if not isinstance(origin, Origin):
        raise CheckpointError(
            f"a {type(model).__name__} without the container it came from: only models from qgraft.load can be saved",
            hint="save_pretrained() is for transformers' own models",
        )
    return origin


def current_matrices(model: nn.Module, origin: Origin) -> list[Matrix]:
    """Every matrix of the container with the model's present bytes and format. Raises CheckpointError."""
    return [_matrix_at(model, path, stored) for path, stored in origin.matrices.items()]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The base's module at `path`, whatever adapters are on it or on what it is in."""
    module = model
    for name in path.split("."):
        module = module.get_submodule(name)
        module = module.base if isinstance(module, LoraLayer) else module
    return module


def is_linear(model: nn.Module, path: str) -> bool:
    """Whether a linear layer, or those of all experts, lies at `path`, as opposed to an embedding."""
    return isinstance(module_at(model, path), QuantizedLinear | ExpertStack)


def changed_source(origin: Origin, what: str) -> CheckpointError:
    """The error for a container that is no longer what the model was loaded from."""
    return CheckpointError(
        f"{origin.path} changed since the model was loaded: {what}",
        hint="norms, tokenizer and metadata are copied from it: put it back, or load the model again",
    )


def _matrix_at(model: nn.Module, path: str, stored: Stored) -> Matrix:
    module = module_at(model, path)
    if not isinstance(module, PackedLayer):
        raise CheckpointError(
            f"{path}: got a {type(module).__name__}, expected the quantized layer that load put there"
        )
    packed = module.packed_weight.get()
    try:
        packed = checked(packed.parts, packed.format, packed.shape[1])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if isinstance(module, QuantizedLinear) and module.input_order is not None:
        stored = replace(stored, column_order=None)  # the layer keeps its columns as they are stored
    return Matrix(path, stored, packed, packed.format)


def _to_cpu(packed: PackedTensor) -> PackedTensor:
    return packed.map(lambda part: part.cpu().contiguous())
