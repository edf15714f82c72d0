"""GGML formats with blocks of 32 weights: what the bytes of a tensor in a GGUF file mean, and how weights are rounded.

`d` and `m` are float16, `q` are codes as stored; bytes are read and written in blocks.py.

    name   weights  bytes  layout (byte offsets)                          weight j =
    q4_0      32     18    0 d | 2 qs[16]                                 d * (q[j] - 8)
    q4_1      32     20    0 d | 2 m | 4 qs[16]                           d * q[j] + m
    q5_0      32     22    0 d | 2 qh[4] | 6 qs[16]                       d * (q[j] - 16)
    q5_1      32     24    0 d | 2 m | 4 qh[4] | 8 qs[16]                 d * q[j] + m
    q8_0      32     34    0 d | 2 qs[32] int8                            q[j] * d
    f32 f16 bf16   1 weight of 4, 2, 2 bytes, no scales                   the number itself

    qs, 4 bits     byte j holds weight j in its LOW nibble and weight j + 16 in its HIGH nibble (not 2j and 2j + 1):

                       byte 0     byte 1         byte 15
                     [ 16 |  0 ][ 17 |  1 ] ... [ 31 | 15 ]      each byte written high nibble | low nibble

    qh, 5th bit    bit j % 8 of byte j // 8 is bit 4 of the code of weight j

The K-quants (blocks of 256 with quantized scales) are in kquants.py.

Quantizing, x the 32 weights of a block, all of it in float32, d and m rounded to float16 only to be stored:

    q4_0, q5_0   d = (the x furthest from 0, with its sign; the first of several) / -8 or -16
                 q = trunc(x / d + 8.5 or 16.5), at most 15 or 31
    q4_1, q5_1   m = min(x), d = (max(x) - m) / 15 or 31, q = trunc((x - m) / d + 0.5)
    q8_0         d = max|x| / 127, q = x / d rounded half away from zero

where `/ d` is a product with the rounded reciprocal, 0 for d = 0. Codes that come out NaN or infinite (a block so
small that 1 / d overflows, or so wide that max - min does) are written as 0. Blocks whose d or m is beyond 65504 get
an infinite one, as in the C code.

Source: ggml-common.h and ggml-quants.c of llama.cpp (`block_q4_0`, `quantize_row_q4_0_ref`, ...) and `gguf.quants`
of the gguf package, 0.19. Exactness: both directions agree with `gguf.quants` bit for bit, except that NaN stays NaN
without its payload, and that the sign of a zero minimum is the one of the first zero of the block, as in the C code
(numpy's depends on its vector width); neither changes a dequantized value. Products d * q are exact in float32, so a
kernel that fuses `d * q + m` gives the same bits. The C code may quantize one code apart where its compiler fuses.

Not chosen: dividing by `d` (one rounding less, other bits), and dividing by a Python number, which CUDA turns into a
product with its reciprocal (other bits than the CPU).
"""

import torch
from torch import Tensor

from qgraft.formats.blocks import Bits, Layout
from qgraft.formats.grid import Grid

Q4_0 = Layout(32, 18, d=0, low=Bits(2, 18, 16, 4), codes=(-8, 7), zero=8)
Q4_1 = Layout(32, 20, d=0, m=2, low=Bits(4, 20, 16, 4), codes=(0, 15))
Q5_0 = Layout(32, 22, d=0, high=Bits(2, 6, 1, 1), low=Bits(6, 22, 16, 4), codes=(-16, 15), zero=16)
Q5_1 = Layout(32, 24, d=0, m=2, high=Bits(4, 8, 1, 1), low=Bits(8, 24, 16, 4), codes=(0, 31))
Q8_0 = Layout(32, 34, d=0, low=Bits(2, 34, 32, 8), codes=(-127, 127))


def fit_q4_0(x_N32: Tensor) -> Grid:
    """The grid of blocks x [N, 32] float32."""
    return _fit_signed(x_N32, 8)


def fit_q5_0(x_N32: Tensor) -> Grid:
    """The grid of blocks x [N, 32] float32."""
    return _fit_signed(x_N32, 16)


def fit_q4_1(x_N32: Tensor) -> Grid:
    """The grid of blocks x [N, 32] float32."""
    return _fit_affine(x_N32, 15)


def fit_q5_1(x_N32: Tensor) -> Grid:
    """The grid of blocks x [N, 32] float32."""
    return _fit_affine(x_N32, 31)


def fit_q8_0(x_N32: Tensor) -> Grid:
    """The grid of blocks x [N, 32] float32."""
    d = _divide(x_N32.abs().amax(dim=1, keepdim=True), 127)
    scaled = (x_N32 * _reciprocal(d)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    size, whole = scaled.abs(), scaled.abs().floor()
    codes = scaled.sign() * (whole + (2 * (size - whole)).floor())  # half away from zero; torch.round goes to even
    return Grid(codes.to(torch.int8), d, low=-127, high=127)


def _fit_signed(x_N32: Tensor, zero: int) -> Grid:
    """x = d * q with codes from -zero to zero - 1."""
    furthest = x_N32.gather(1, x_N32.abs().argmax(dim=1, keepdim=True))  # [N, 1], argmax gives the first of equals
    d = _divide(furthest, -zero)
    stored = _to_codes((x_N32 * _reciprocal(d)).add_(zero + 0.5), 2 * zero - 1)
    return Grid(stored.sub_(zero), d, low=-zero, high=zero - 1)


def _fit_affine(x_N32: Tensor, largest: int) -> Grid:
    """x = d * q + m with codes from 0 to `largest`."""
    m = x_N32.min(dim=1, keepdim=True).values  # min and max along a dim return the first of equals: sign of zero
    d = _divide(x_N32.max(dim=1, keepdim=True).values - m, largest)
    return Grid(_to_codes(((x_N32 - m) * _reciprocal(d)).add_(0.5), largest), d, m, low=0, high=largest)


def _divide(values_N1: Tensor, divisor: int) -> Tensor:
    """values / divisor with one rounding on every device (see "Not chosen" above)."""
    return values_N1 / torch.full_like(values_N1, divisor)


def _reciprocal(d_N1: Tensor) -> Tensor:
    """1 / d, and 0 for d = 0."""
    return torch.where(d_N1 == 0, 0.0, torch.ones_like(d_N1) / d_N1)


def _to_codes(values_NQ: Tensor, largest: int) -> Tensor:
    """Float32 -> int8, truncated, from 0 to `largest`; NaN and infinities give 0."""
    return values_NQ.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_(0, largest).to(torch.int8)
