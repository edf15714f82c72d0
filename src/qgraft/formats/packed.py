"""PackedTensor: the stored bytes of one weight, exactly as in the file, with the name of the format that reads them.

Two storage families exist, told apart by where the scales live:

    ggml      one uint8 matrix [out, row_bytes]; the scales sit inside each block of bytes      formats/ggml.py
    rowwise   int8 matrix [out, in * bits / 8] and one scale for each output row [out]          formats/rowwise.py

A class for each format was not chosen: a format is a name and a few pure functions, looked up in `FORMATS`
(formats/__init__.py); what holds tensors never needs to know how the bits lie.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qgraft.formats.grid import Grid


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """One packed weight matrix.

    Attributes:
        format: key of `FORMATS`, for example "q4_1".
        shape: (out_features, in_features) of the weight that the bytes stand for.
        data: uint8 [out, row_bytes] (ggml family) or int8 [out, in * bits / 8] (rowwise family).
        scale: floating point [out] for the rowwise family, None for the ggml family.
    """

    format: str
    shape: tuple[int, int]
    data: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def rows(self, index: Tensor) -> "PackedTensor":
        """The packed rows `index` ([n] int64) as a packed tensor of their own; every format stores whole rows."""
        scale = None if self.scale is None else self.scale[index]
        return replace(self, shape=(index.numel(), self.shape[1]), data=self.data[index], scale=scale)


@dataclass(frozen=True)
class Format:
    """How one format is read and written.

    Attributes:
        name: the format's name, lower case, as the field writes it.
        family: "ggml" or "rowwise".
        block_size: weights that share one block; `in_features` must be a multiple of it.
        block_bytes: bytes of one block (rowwise: of `block_size` weights, scales not counted).
        dequantize: (packed, dtype) -> [out, in].
        quantize: (w_OI floating point) -> PackedTensor, or None where qgraft only reads the format.
        unpack: (packed) -> Grid, or None for float formats, which have no grid.
        pack: (grid) -> PackedTensor, the inverse of `unpack`, or None where the format has no grid or is only read.
    """

    name: str
    family: str
    block_size: int
    block_bytes: int
    dequantize: Callable[[PackedTensor, torch.dtype], Tensor]
    quantize: Callable[[Tensor], PackedTensor] | None
    unpack: Callable[[PackedTensor], Grid] | None = None
    pack: Callable[[Grid], PackedTensor] | None = None

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row of `in_features` weights (a multiple of `block_size`), row scales not counted."""
        return in_features // self.block_size * self.block_bytes
