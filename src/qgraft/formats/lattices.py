"""GGML formats with codebooks of points: 4 or 8 neighbouring weights are one place in a table, their signs beside it.

Blocks of 256 weights; read, never written: each is made with a search over weights of importance.

    name      bytes  layout (byte offsets)                                        weights of        table
    iq1_s       50   0 d | 2 qs[32] | 34 qh[16]                                   (d * s) / 8       2048 x 8
    iq1_m       56   0 qs[32] | 32 qh[16] | 48 scales[8]                          (d * s) / 8       2048 x 8, that of iq1_s
    iq2_xxs     66    0 d | 2 qs[64]                                              (d * s) / 8       256 x 8
    iq2_xs      74    0 d | 2 qs[64] | 66 scales[8]                               (d * s) / 8       512 x 8
    iq2_s       82    0 d | 2 qs[32] | 34 signs[32] | 66 qh[8] | 74 scales[8]     (d * s) / 8       1024 x 8
    iq3_xxs     98    0 d | 2 qs[64] | 66 words[32]                               (d * s) / 4       256 x 4
    iq3_s      110    0 d | 2 qs[64] | 66 qh[8] | 74 signs[32] | 106 scales[4]    d * s             512 x 4

The scale s of a run of 16 or 32 weights is 2 v + 1, v the integer that is stored. So each of them is a grid: a code is the
number in the table with its sign, -62..62; in iq1 8 times it and 1 more or less, -9..9.

    iq1_s     v 3 bits (bits 12-14 of the 16 of qh) for 32 weights, bit 15: the sign of what is added; places: qs, 8 bits,
              and 3 of qh
    iq1_m     v 3 bits of scales for 16; d: the upper 4 bits of the four 16 of scales; places: qs and 3 bits of qh's
              nibbles, whose bit 3 is the sign of what is added
    iq2_xxs   for 32 weights: 4 bytes of places, 28 bits of 4 signs, v 4 bits above them
    iq2_xs    16 bits for 8 weights: a place in 9, signs in 7; v 4 bits for 16 weights: nibbles of scales
    iq2_s     places: qs and 2 bits of qh; v as iq2_xs
    iq3_xxs   places: qs; for 32 weights 28 bits of 4 signs, v 4 bits above them
    iq3_s     places: qs and a bit of qh; v 4 bits for 32 weights: nibbles of scales

    signs     a bit for each of 8 weights, 1: minus; of 7 bits the eighth makes their number even

Source: ggml-common.h and `dequantize_row_iq*` in ggml-quants.c of llama.cpp. Exactness: bit for bit as `gguf.quants`: a
product of d, s and a code has at most 22 bits, so the order of the factors and the powers of two change nothing.

The tables are those of the `gguf` package (`gguf.quants.IQ2_XXS.grid`, ...), 37 KB that are read where they are first asked
for; the kernels in C are handed the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qgraft.formats.blocks import read_half
from qgraft.formats.device_tables import on_device
from qgraft.formats.grid import Grid

# Shapes: N blocks of 256 weights; P points of one of them, S runs that share a scale.
TABLES = {
    "iq1_s": (2048, 8),
    "iq2_xxs": (256, 8),
    "iq2_xs": (512, 8),
    "iq2_s": (1024, 8),
    "iq3_xxs": (256, 4),
    "iq3_s": (512, 4),
}


@dataclass(frozen=True)
class Points:
    """What the bytes of N blocks hold.

    Attributes:
        d: float32 [N, 1].
        scales: int [N, S].
        places: int [N, P], in the table.
        signs: int [N, 32], a bit for each of 8 weights.
    """

    d: Tensor
    scales: Tensor
    places: Tensor
    signs: Tensor


@dataclass(frozen=True)
class Lattice:
    """A format of this family, which stands where others have a `Layout`.

    Attributes:
        bytes: in one block.
        table: whose table it is.
        unit: what d is multiplied with.
        scale_bits: of v.
        points: [N, bytes] uint8 -> Points.
        weights: in one block.
    """

    bytes: int
    table: str
    unit: float
    scale_bits: int
    points: Callable[[Tensor], Points]
    weights: int = 256

    def read(self, blocks: Tensor) -> Grid:
        """[N, bytes] uint8 -> grid of N rows, a block each."""
        found, on_cpu = self.points(blocks), table(self.table)
        values = table_on(self.table, blocks.device)
        sign = 1 - 2 * _bits(found.signs, range(8)).to(torch.int8)  # [N, 256]
        codes, high = values[found.places].flatten(1), int(on_cpu.max())
        codes, high = (8 * codes + sign, 9) if self.table == "iq1_s" else (codes * sign, high)
        scales = (2 * found.scales + 1).to(torch.int8)
        most = (2 << self.scale_bits) - 1
        return Grid(codes, found.d * self.unit, sub_scales=scales, low=-high, high=high, sub_low=1, sub_high=most)


@cache
def table(name: str) -> Tensor:
    """The table of the format `name`, one of `TABLES`: int8 [places, 4 or 8]."""
    from gguf import quants  # here: what is written and most of what is read needs none

    theirs = getattr(quants, name.upper())
    theirs.init_grid()
    return torch.from_numpy(theirs.grid).to(torch.int8).view(TABLES[name])


def table_on(name: str, device: torch.device) -> Tensor:
    """The same on a device."""
    return on_device(name, lambda: table(name), device)


# ---------------------------------------------------------------- bytes of N blocks


def _words(raw_NB: Tensor, nbytes: int) -> Tensor:
    """[N, k * nbytes] uint8 -> [N, k] int64, little endian, without a sign."""
    shifts = torch.arange(0, 8 * nbytes, 8, device=raw_NB.device)
    return (raw_NB.long().unflatten(1, (-1, nbytes)) << shifts).sum(2)


def _bits(words_NK: Tensor, shifts: range, mask: int = 1) -> Tensor:
    """[N, k] -> [N, k * len(shifts)]: the bits of each word from one shift after the other on."""
    by = torch.arange(shifts.start, shifts.stop, shifts.step, dtype=words_NK.dtype, device=words_NK.device)
    return ((words_NK[:, :, None] >> by) & mask).flatten(1)


def _even_signs(bits_NP: Tensor) -> Tensor:
    """7 bits -> 8, of which an even number is set."""
    parity = bits_NP ^ (bits_NP >> 4)
    parity = parity ^ (parity >> 2)
    return bits_NP | ((parity ^ (parity >> 1)) & 1) << 7


def _iq1_s(blocks: Tensor) -> Points:
    qh = _words(blocks[:, 34:50], 2)
    places = blocks[:, 2:34].long() | _bits(qh, range(0, 12, 3), 7) << 8
    signs = (qh >> 15).repeat_interleave(4, dim=1) * 255
    return Points(read_half(blocks[:, :2]), qh >> 12 & 7, places, signs)


def _iq1_m(blocks: Tensor) -> Points:
    high, scales = _bits(blocks[:, 32:48].long(), range(0, 8, 4), 15), _words(blocks[:, 48:56], 2)
    halves = (scales >> 12) << torch.arange(0, 16, 4, device=blocks.device)
    d = read_half(halves.sum(1, keepdim=True).to(torch.uint16).view(torch.uint8))
    places = blocks[:, :32].long() | (high & 7) << 8
    return Points(d, _bits(scales, range(0, 12, 3), 7), places, (high >> 3) * 255)


def _iq2_xxs(blocks: Tensor) -> Points:
    halves = blocks[:, 2:].unflatten(1, (8, 8))
    words = _words(halves[:, :, 4:].flatten(1), 4)
    signs = _even_signs(_bits(words, range(0, 28, 7), 127))
    return Points(read_half(blocks[:, :2]), words >> 28, halves[:, :, :4].flatten(1).long(), signs)


def _iq2_xs(blocks: Tensor) -> Points:
    words, scales = _words(blocks[:, 2:66], 2), _bits(blocks[:, 66:], range(0, 8, 4), 15)
    return Points(read_half(blocks[:, :2]), scales, words & 511, _even_signs(words >> 9))


def _iq2_s(blocks: Tensor) -> Points:
    places = blocks[:, 2:34].long() | _bits(blocks[:, 66:74], range(0, 8, 2), 3).long() << 8
    return Points(read_half(blocks[:, :2]), _bits(blocks[:, 74:], range(0, 8, 4), 15), places, blocks[:, 34:66])


def _iq3_xxs(blocks: Tensor) -> Points:
    words = _words(blocks[:, 66:], 4)
    signs = _even_signs(_bits(words, range(0, 28, 7), 127))
    return Points(read_half(blocks[:, :2]), words >> 28, blocks[:, 2:66].long(), signs)


def _iq3_s(blocks: Tensor) -> Points:
    places = blocks[:, 2:66].long() | _bits(blocks[:, 66:74], range(8)).long() << 8
    return Points(read_half(blocks[:, :2]), _bits(blocks[:, 106:], range(0, 8, 4), 15), places, blocks[:, 74:106])


LATTICES = {
    "iq1_s": Lattice(50, "iq1_s", 1 / 8, 3, _iq1_s),
    "iq1_m": Lattice(56, "iq1_s", 1 / 8, 3, _iq1_m),
    "iq2_xxs": Lattice(66, "iq2_xxs", 1 / 8, 4, _iq2_xxs),
    "iq2_xs": Lattice(74, "iq2_xs", 1 / 8, 4, _iq2_xs),
    "iq2_s": Lattice(82, "iq2_s", 1 / 8, 4, _iq2_s),
    "iq3_xxs": Lattice(98, "iq3_xxs", 1 / 4, 4, _iq3_xxs),
    "iq3_s": Lattice(110, "iq3_s", 1.0, 4, _iq3_s),
}
