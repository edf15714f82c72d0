"""Layout: one way in which folders of safetensors or pickles keep their matrices.

A folder holds tensors by name; the matrix that a model calls `X.weight` is one of them or several. A layout says which
(`suffixes`), whether a folder and a matrix are its own (`claims`, `holds`), how to make a packed tensor of them and them
of a packed tensor (`read`, `write`), and what config.json says of it (`configure`). Everything else, which tensor belongs
where and what is copied, is the same for all layouts (folder_model.py, folder_write.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qgraft.formats import PackedTensor

WEIGHT = ".weight"  # what a model calls the matrix of a layer


def tensor_name(weight: str, suffix: str) -> str:
    """What the tensor with this suffix is called, of the matrix `weight`; few matrices of floats are not called X.weight."""
    return weight if suffix == WEIGHT else weight.removesuffix(WEIGHT) + suffix


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """One matrix of a folder, wherever its tensors lie. What has been read of it stays as long as it does.

    Attributes:
        name: as the model would call it, in the folder's words: `X.weight`; of all experts X.
        tensors: everything that is in the folder, by name; read when called.
        config: config.json.
    """

    name: str
    tensors: Mapping[str, Callable[[], Tensor]]
    config: Mapping[str, Any]
    _read: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, suffix: str) -> Tensor | None:
        """The tensor `X` + suffix; None where the folder has none."""
        if suffix not in self._read:
            read = self.tensors.get(tensor_name(self.name, suffix))
            if read is None:
                return None
            self._read[suffix] = read()
        return self._read[suffix]

    def numbers(self) -> Tensor:
        """The tensor that is called as the matrix is: what it is made of where it is not packed."""
        found = self.tensor(WEIGHT)
        assert found is not None, self.name
        return found

    def equals(self, other: "StoredMatrix", suffixes: Sequence[str]) -> bool:
        """Whether both have the same numbers in these tensors."""
        for suffix in suffixes:
            one, two = self.tensor(suffix), other.tensor(suffix)
            if one is None or two is None:
                if one is not two:
                    return False
            elif not torch.equal(one, two):
                return False
        return True


@dataclass(frozen=True)
class Layout:
    """How one kind of folder keeps its matrices.

    Attributes:
        formats: those of the packed tensors that it reads and writes.
        suffixes: the tensors of the matrix `X.weight` are X + suffix; the first is always there.
        packed_as: what its matrices are, for messages; None for plain floats, which can be quantized while they are read.
        claims: (config.json) -> whether a folder with this config.json may hold such matrices.
        holds: (matrix) -> whether this matrix is kept so; asked in the order of the table.
        read: (matrix, (out, in) of the layer, whether floats lie [in, out]) -> its packed tensor, or floats [out, in].
            Raises CheckpointError.
        write: (packed, whether floats lie [in, out]) -> {suffix: tensor}.
        configure: (config.json, the formats of all matrices) -> config.json for these; the same where nothing changes.
        experts: whether its matrices are those of all experts of a layer, in a parameter X of theirs instead of `X.weight`:
            read and written are the rows of all, one expert behind the other; a tensor of theirs is [experts, out, ...].
    """

    formats: tuple[str, ...]
    suffixes: tuple[str, ...]
    packed_as: str | None
    claims: Callable[[Mapping[str, Any]], bool]
    holds: Callable[[StoredMatrix], bool]
    read: Callable[[StoredMatrix, tuple[int, int], bool], PackedTensor | Tensor]
    write: Callable[[PackedTensor, bool], dict[str, Tensor]]
    configure: Callable[[Mapping[str, Any], Sequence[str]], Mapping[str, Any]]
    experts: bool = False
