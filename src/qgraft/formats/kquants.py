"""GGML K-quants: blocks of 256 weights whose scales are themselves quantized.

    name  bytes   layout (byte offsets)                                   weight j, s = j // 16 (q4_k, q5_k: j // 32)
    q2_k    84    0 scales[16] | 16 qs[64] | 80 d | 82 dmin               (d * sc[s]) * q[j] - (dmin * mn[s])
    q3_k   110    0 hmask[32] | 32 qs[64] | 96 scales[12] | 108 d         (d * sc[s]) * q[j]
    q4_k   144    0 d | 2 dmin | 4 scales[12] | 16 qs[128]                (d * sc[s]) * q[j] - (dmin * mn[s])
    q5_k   176    0 d | 2 dmin | 4 scales[12] | 16 qh[32] | 48 qs[128]    (d * sc[s]) * q[j] - (dmin * mn[s])
    q6_k   210    0 ql[128] | 128 qh[64] | 192 scales[16] int8 | 208 d    (d * sc[s]) * (q[j] - 32)

Which bits are which weight, as `Bits` of blocks.py reads them:

    2-bit codes in runs of 32 bytes   byte i of a run: bits 0-1 weight i, 2-3 weight i + 32, 4-5 i + 64, 6-7 i + 96
                                      (qs of q2_k and q3_k, qh of q6_k)
    nibbles in runs of 32 or 64       byte i of a run: low nibble weight i, high nibble weight i + 32 (q4_k, q5_k)
                                      or i + 64 (ql of q6_k)
    1-bit fields in one run of 32     byte i: bit k belongs to weight i + 32 k (hmask of q3_k, qh of q5_k)

    q2_k  scales   byte s: low nibble sc[s], high nibble mn[s]
    q3_k  code     q = (2 bits) - 4, or (2 bits) - 0 where the bit of hmask is 1: the mask is inverted
    q3_k  scales   6 bits less 32; low 4 bits: nibbles of bytes 0-7 (low nibbles s = 0..7, high s = 8..15);
                   high 2 bits: bytes 8-11, bits 0-1 s = 0..3, bits 2-3 s = 4..7, 4-5 s = 8..11, 6-7 s = 12..15
    q4_k, q5_k     6-bit sc and mn of 8 runs in 12 bytes; s = 0..3: sc is the low 6 bits of byte s, mn of byte s + 4;
          scales   s = 4..7: low 4 bits from byte s + 4 (low nibble sc, high nibble mn),
                   high 2 bits from the top bits of byte s - 4 (sc) and of byte s (mn)

Source: ggml-common.h and `dequantize_row_q*_K` in ggml-quants.c of llama.cpp, `gguf.quants` of the gguf package, 0.19.
Exactness: bit for bit equal to `gguf.quants` in float32 (NaN stays NaN without its payload). How q4_k, q5_k and q6_k are
written is in kquants_fit.py.

Not chosen: quantizing to q2_k and q3_k, each of which has a search of its own. The blocks of q2_k are written again where
only their minimums changed (an exact merge).
"""

import torch
from torch import Tensor

from qgraft.formats.blocks import Bits, Layout, SubIntegers, read_fields

# Shapes: N blocks of S runs that share a scale; scales and minimums are int8 [N, S].


def _read_nibbles(raw_N16: Tensor) -> tuple[Tensor, Tensor]:
    """q2_k: 16 bytes -> 16 scales and 16 minimums of 4 bits."""
    return (raw_N16 & 15).view(torch.int8), (raw_N16 >> 4).view(torch.int8)


def _write_nibbles(scales_N16: Tensor, minimums_N16: Tensor | None) -> Tensor:
    """The inverse of `_read_nibbles`."""
    assert minimums_N16 is not None
    return scales_N16.view(torch.uint8) | (minimums_N16.view(torch.uint8) << 4)


def _read_split(raw_N12: Tensor) -> tuple[Tensor, None]:
    """q3_k: 12 bytes -> 16 scales of 6 bits."""
    low, high = read_fields(raw_N12[:, :8], 8, 4), read_fields(raw_N12[:, 8:], 4, 2)
    return (low | (high << 4)).view(torch.int8) - 32, None


def _read_pairs(raw_N12: Tensor) -> tuple[Tensor, Tensor]:
    """q4_k, q5_k: 12 bytes -> 8 scales and 8 minimums of 6 bits."""
    a, b, c = raw_N12.split(4, dim=1)
    scales = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], dim=1)
    minimums = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], dim=1)
    return scales.view(torch.int8), minimums.view(torch.int8)


def _write_pairs(scales_N8: Tensor, minimums_N8: Tensor | None) -> Tensor:
    """The inverse of `_read_pairs`."""
    assert minimums_N8 is not None
    scales, more_scales = scales_N8.view(torch.uint8).split(4, dim=1)
    minimums, more_minimums = minimums_N8.view(torch.uint8).split(4, dim=1)
    a = scales | ((more_scales & 48) << 2)
    b = minimums | ((more_minimums & 48) << 2)
    return torch.cat([a, b, (more_scales & 15) | (more_minimums << 4)], dim=1)


def _read_bytes(raw_N16: Tensor) -> tuple[Tensor, None]:
    """q6_k: 16 scales of a byte."""
    return raw_N16.clone(memory_format=torch.contiguous_format).view(torch.int8), None


def _write_bytes(scales_N16: Tensor, _: Tensor | None) -> Tensor:
    """The inverse of `_read_bytes`."""
    return scales_N16.view(torch.uint8)


_NIBBLES = SubIntegers(0, 16, count=16, low=0, high=15, read=_read_nibbles, write=_write_nibbles)
_SPLIT = SubIntegers(96, 108, count=16, low=-32, high=31, read=_read_split)
_PAIRS = SubIntegers(4, 16, count=8, low=0, high=63, read=_read_pairs, write=_write_pairs)
_BYTES = SubIntegers(192, 208, count=16, low=-128, high=127, read=_read_bytes, write=_write_bytes)

Q2_K = Layout(256, 84, d=80, m=82, sub=_NIBBLES, low=Bits(16, 80, 32, 2), codes=(0, 3))
Q3_K = Layout(256, 110, d=108, sub=_SPLIT, low=Bits(32, 96, 32, 2), high=Bits(0, 32, 32, 1), codes=(-4, 3), zero=4)
Q4_K = Layout(256, 144, d=0, m=2, sub=_PAIRS, low=Bits(16, 144, 32, 4), codes=(0, 15))
Q5_K = Layout(256, 176, d=0, m=2, sub=_PAIRS, high=Bits(16, 48, 32, 1), low=Bits(48, 176, 32, 4), codes=(0, 31))
Q6_K = Layout(
    256, 210, d=208, sub=_BYTES, low=Bits(0, 128, 64, 4), high=Bits(128, 192, 32, 2), codes=(-32, 31), zero=32
)
