"""GGML formats whose codes of 4 bits are places in a codebook: not evenly spaced, more of them where weights are many.

    name     weights  bytes  layout (byte offsets)                           weight j =
    iq4_nl       32     18   0 d | 2 qs[16]                                  d * NL[q[j]]
    iq4_xs      256    136   0 d | 2 sh[2] | 4 sl[4] | 8 qs[128]             (d * sc[j // 32]) * NL[q[j]]
    mxfp4        32     17   0 e | 1 qs[16]                                  2^(e - 128) * E2M1[q[j]]
    nvfp4        64     36   0 e[4] | 4 qs[32]                               e4m3(e[j // 16]) / 2 * E2M1[q[j]]

    NL     -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113
    E2M1   0 1 2 3 4 6 8 12, and the same with a minus: the floats of 4 bits, doubled, so that they are integers
    qs     as in ggml.py, low nibbles first, in runs of 16 bytes (nvfp4: 8): a run of bytes is 32 weights (16)
    sc     6 bits less 32: the low 4 bits of s in nibble s % 2 of sl[s // 2], the high 2 in bits 2 s of the 16 of sh
    e4m3   without a sign: 4 bits of exponent less 7, 3 of mantissa

What OCP's specifications call NaN is a number in llama.cpp, and so here: 2^127 for the byte 255 of mxfp4, 0 for 127 of nvfp4;
the sign of a scale of nvfp4 is not looked at. Such bytes are read, and not written.

Quantizing, x the weights of a block (or sub-group), in float32:

    iq4_nl, iq4_xs   as q6_k in kquants_fit.py: w = x^2; step widths (the x furthest from 0) / (r - 127), r = -7..7, and
                     / 127; codes of the nearest levels; the scale sum w l x / sum w l^2 of the largest
                     (sum w l x)^2 / sum w l^2. iq4_xs: d = (the scale of largest magnitude) / -32, sc the nearest
                     multiple. Codes are then chosen again.
    mxfp4            e = floor(log2 max|x|) + 125; the nearest levels, of two the one nearer to 0
    nvfp4            e = max|x| / 6 as e4m3; likewise

Source: ggml-common.h, `quantize_row_iq4_nl_impl`, `quantize_row_mxfp4_ref`, `quantize_row_nvfp4_ref` in ggml-quants.c of
llama.cpp, `gguf.quants` of the gguf package, 0.19. Exactness: read bit for bit as `gguf.quants` does; written as by the C
code without fused multiply-add, but for three things. Blocks of mxfp4 below 2^-125, whose exponent wraps around there, get
the smallest. The largest scales of nvfp4, 256 to 448, are rounded as all others, where the C code takes 448 for each.
Weights too large for a finite scale of iq4 get an infinite one, and not NaN.

A tensor of nvfp4 in a GGUF has no scale of its own beside those of the blocks, and these end at 2^-10: weights much smaller
than 0.01, as those of most models, lose precision. Files converted from NVIDIA's checkpoints carry that scale in a tensor
beside the weight.
"""

from itertools import pairwise

import torch
from torch import Tensor

from qgraft.formats.blocks import Bits, Layout, Scales, SubIntegers, levels_on, read_fields, write_fields
from qgraft.formats.grid import Grid

# Shapes: N blocks of S sub-groups of W weights; M = N * S sub-groups; WM has the place in the sub-group first.
NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_SMALLEST = 1e-15  # what is smaller counts as zero
_MOST_BLOCKS = 8192  # of 32 weights, fitted at a time: a step then stays in the cache


def _read_six_bits(raw_N6: Tensor) -> tuple[Tensor, None]:
    """iq4_xs: 6 bytes -> 8 scales."""
    high, low = read_fields(raw_N6[:, :2], 1, 2), read_fields(raw_N6[:, 2:], 1, 4)
    return (low | high << 4).view(torch.int8) - 32, None


def _write_six_bits(scales_N8: Tensor, _: Tensor | None) -> Tensor:
    """The inverse of `_read_six_bits`."""
    stored = (scales_N8 + 32).view(torch.uint8)
    return torch.cat([write_fields(stored >> 4, 1, 2), write_fields(stored & 15, 1, 4)], dim=1)


_SIX_BITS = SubIntegers(2, 8, count=8, low=-32, high=31, read=_read_six_bits, write=_write_six_bits)

IQ4_NL = Layout(32, 18, d=0, low=Bits(2, 18, 16, 4), codes=(0, 15), levels=NL)
IQ4_XS = Layout(256, 136, d=0, sub=_SIX_BITS, low=Bits(8, 136, 16, 4), codes=(0, 15), levels=NL)
MXFP4 = Layout(32, 17, d=Scales(0, 1, torch.float8_e8m0fnu), low=Bits(1, 17, 16, 4), codes=(0, 15), levels=E2M1)
NVFP4 = Layout(64, 36, d=Scales(0, 4, torch.float8_e4m3fn), low=Bits(4, 36, 8, 4), codes=(0, 15), levels=E2M1)


# ---------------------------------------------------------------- iq4_nl, iq4_xs


def fit_iq4_nl(x_N32: Tensor) -> Grid:
    """The grid of blocks x [N, 32] float32."""
    scale_M = _search(x_N32)
    codes = _nearest_nl(x_N32 * _reciprocal(scale_M)[:, None])
    return _grid(codes, scale_M[:, None], NL)


def fit_iq4_xs(x_NQ: Tensor) -> Grid:
    """The grid of blocks x [N, 256] float32."""
    scale_NS = _search(x_NQ.reshape(-1, 32)).view(-1, 8)
    largest_N1 = scale_NS.gather(1, scale_NS.abs().argmax(dim=1, keepdim=True))  # the first of equals
    d_N1 = largest_N1 / torch.full_like(largest_N1, -32)
    sub_NS = (scale_NS * _reciprocal(d_N1)).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-32, 31)
    inverse_NS1 = _reciprocal(d_N1 * sub_NS)[:, :, None]
    codes = _nearest_nl(x_NQ.reshape(-1, 8, 32) * inverse_NS1).reshape(x_NQ.shape)
    return _grid(codes, d_N1, NL, sub_NS.to(torch.int8))


def _search(x_MW: Tensor) -> Tensor:
    """The scale [M] of each sub-group [M, 32], 0 where all of it counts as zero."""
    parts = [_search_part(part.T.contiguous()) for part in x_MW.split(_MOST_BLOCKS)]
    return torch.cat(parts) if parts else x_MW.new_zeros(0)


def _search_part(x_WM: Tensor) -> Tensor:
    furthest = x_WM.gather(0, x_WM.abs().argmax(dim=0, keepdim=True))[0]
    w_WM = x_WM * x_WM
    one = torch.ones_like(furthest)
    tries = [one / (furthest / (one * -NL[0]))]  # the one that turns signs, rounded twice
    tries += [(one * (NL[0] + offset)) / furthest for offset in range(-7, 8)]
    scale = best = torch.zeros_like(furthest)
    for number, inverse in enumerate(tries):
        q_WM = levels_on(NL, x_WM.device)[_nearest_nl(x_WM * inverse).int()]
        wq_WM = w_WM * q_WM
        sum_xq, sum_q2 = _sum_rows(wq_WM * x_WM), _sum_rows(wq_WM * q_WM)
        new_scale = sum_xq / sum_q2
        better = (sum_q2 > 0) & (sum_xq * sum_xq > best * sum_q2) if number else sum_q2 >= 0
        scale = torch.where(better, new_scale, scale)
        best = torch.where(better, new_scale * sum_xq, best)
    return torch.where(furthest.abs() < _SMALLEST, 0.0, scale.nan_to_num_(torch.inf, torch.inf, -torch.inf))


def _nearest_nl(values: Tensor) -> Tensor:
    """The codes, int8, of the nearest levels of NL; of two the upper one."""
    levels = levels_on(NL, values.device)
    above = torch.bucketize(values, levels, right=True).clamp_(1, 15)  # the first level that is larger
    lower, upper = levels[above - 1], levels[above]
    return (above - (values - lower < upper - values).long()).to(torch.int8)


def _sum_rows(terms: Tensor) -> Tensor:
    """[W, M] -> [M], added in order as the C code does."""
    total = terms[0].clone()
    for row in terms[1:].unbind():
        total += row
    return total


def _reciprocal(d: Tensor) -> Tensor:
    """1 / d, and 0 for d = 0."""
    return torch.where(d == 0, 0.0, torch.ones_like(d) / d)


# ---------------------------------------------------------------- mxfp4, nvfp4


def fit_mxfp4(x_N32: Tensor) -> Grid:
    """The grid of blocks x [N, 32] float32."""
    most_N1 = x_N32.abs().amax(dim=1, keepdim=True)
    exponent = torch.where(most_N1 > 0, most_N1.log2().floor() + 125, 0).clamp_(0, 254).to(torch.uint8)
    return _fit_e2m1(MXFP4, exponent, x_N32)


def fit_nvfp4(x_N64: Tensor) -> Grid:
    """The grid of blocks x [N, 64] float32."""
    most_NS = x_N64.reshape(-1, 4, 16).abs().amax(dim=2)
    return _fit_e2m1(NVFP4, _to_e4m3(most_NS / torch.full_like(most_NS, 6)), x_N64)


def _to_e4m3(values: Tensor) -> Tensor:
    """Floats >= 0 -> e4m3 as uint8, at most 448; half a step is rounded up, also where torch rounds to even."""
    bits = values.clamp(max=448.0).view(torch.int32)
    normal = ((bits + 0x80000) >> 20) - (120 << 3)  # the exponent's bias from 127 to 7
    small = (values * 512 + 0.5).to(torch.int32).clamp_(max=7)  # below 2^-6
    return torch.where(bits < 121 << 23, small, normal.clamp(max=126)).to(torch.uint8)


def _fit_e2m1(layout: Layout, stored_NS: Tensor, x_NQ: Tensor) -> Grid:
    """The nearest codes for scales as they are stored."""
    assert isinstance(layout.d, Scales)
    d_NS = layout.d.read(stored_NS)
    x_NSW = x_NQ.reshape(*d_NS.shape, x_NQ.shape[1] // d_NS.shape[1])
    size = torch.zeros_like(x_NSW, dtype=torch.int8)
    for low, high in pairwise(E2M1[:8]):  # a middle times d is exact; what lies on one goes down
        size += x_NSW.abs() > (d_NS * ((low + high) / 2))[:, :, None]
    size = torch.where(d_NS[:, :, None] == 0, 0, size)
    codes = torch.where((x_NSW < 0) & (size > 0), size + 8, size)
    return _grid(codes.reshape(x_NQ.shape), d_NS, E2M1)


def _grid(codes: Tensor, d: Tensor, levels: tuple[int, ...], sub_scales: Tensor | None = None) -> Grid:
    return Grid(codes, d, sub_scales=sub_scales, levels=levels_on(levels, codes.device), low=0, high=15)
