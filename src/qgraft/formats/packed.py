"""PackedTensor: the stored tensors of one weight, exactly as in the file, with the name of the format that reads them.

A format says what these tensors are, one `Part` for each: a GGML block keeps its scales among its bytes and has one part,
ChatGLM's rows have two, grouped formats and codebooks more.

    part     of which formats               shape                  its rows
    data     ggml.py, kquants.py            [out, row_bytes]       0
    data     rowwise.py                     [out, in * bits / 8]   0
    scale    rowwise.py                     [out]                  0
    ...      one number for each group      [out, groups]          0
    ...      a codebook, a permutation      [16], [in]             none: all rows share it

`rows` is the dimension along which the rows of the weight lie. Whatever moves, copies, checks or cuts a packed tensor goes
by this list and knows no format.

A class for each format was not chosen: a format is a name and a few pure functions, looked up in `FORMATS`
(formats/__init__.py); what holds tensors never needs to know how the bits lie. Nor a name for each kind of part in
PackedTensor (`scale`, `zeros`, ...): every new family would then have changed the schema of every op.
"""

import math
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
        shape: (out_features, in_features) of the weight that the parts stand for.
        parts: the stored tensors, in the order of the format's `parts`.
    """

    format: str
    shape: tuple[int, int]
    parts: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held by all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Where the parts lie."""
        return self.parts[0].device

    def map(self, change: Callable[[Tensor], Tensor]) -> "PackedTensor":
        """The same weight with `change(part)` for each part: a copy, or parts on another device."""
        return replace(self, parts=tuple(change(part) for part in self.parts))


@dataclass(frozen=True)
class Part:
    """What one stored tensor of a format is.

    Attributes:
        name: what a layer calls the buffer that holds it.
        dtypes: those it may have; sizes are estimated with the first.
        shape: (out_features, in_features) -> its shape.
        rows: the dimension along which the rows of the weight lie; None where all rows share it.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    shape: Callable[[int, int], tuple[int, ...]]
    rows: int | None = 0


@dataclass(frozen=True)
class Format:
    """How one format is read and written.

    Attributes:
        name: the format's name, lower case, as the field writes it.
        block_size: `in_features` must be a multiple of it: weights that share a block, or a group, or a byte.
        parts: the stored tensors; the rows of the weight are counted in the first.
        dequantize: (packed, dtype) -> [out, in].
        quantize: (w_OI floating point) -> PackedTensor, or None where qgraft only reads the format.
        unpack: (packed) -> Grid, or None for float formats, which have no grid.
        pack: (grid) -> PackedTensor, the inverse of `unpack`, or None where the format has no grid or is only read.
        take_rows: (packed, rows [n] int64) -> these rows, where no part's `rows` can say it because several rows share
            a number of a part (AWQ packs along `out`); None: each part is cut along its `rows`.
    """

    name: str
    block_size: int
    parts: tuple[Part, ...]
    dequantize: Callable[[PackedTensor, torch.dtype], Tensor]
    quantize: Callable[[Tensor], PackedTensor] | None
    unpack: Callable[[PackedTensor], Grid] | None = None
    pack: Callable[[Grid], PackedTensor] | None = None
    take_rows: Callable[[PackedTensor, Tensor], PackedTensor] | None = None

    @property
    def by_rows(self) -> bool:
        """Whether rows can be packed some at a time and joined: no part belongs to several of them."""
        return self.take_rows is None and all(part.rows is not None for part in self.parts)

    def nbytes(self, rows: int, in_features: int) -> int:
        """Bytes of a weight of this shape, with each part in the first of its dtypes."""
        return sum(math.prod(part.shape(rows, in_features)) * part.dtypes[0].itemsize for part in self.parts)
