"""Writing K-quants: the search for the scales and minimums of q4_k, q5_k and q6_k.

A block has 256 weights in sub-groups of 32 (q4_k, q5_k) or 16 (q6_k). Three steps, all of them in float32:

    1. Each sub-group x alone gets a real scale and minimum, by trying codes l from one step width after the other:

       q4_k, q5_k   w = sqrt(mean(x^2)) + |x|;  minimum = min(x, 0);  for 21 or 16 step widths
                        l = round((x - minimum) * (L + r) / (max(x) - minimum)), 0..L, with L = 15 or 31
                        scale, minimum = argmin sum w (scale * l + minimum - x)^2, minimum at most 0
                    keeping what lowers that sum; r goes up by 0.1 from -1 or -0.5; later widths use the minimum found
       q6_k         w = x^2;  for 19 step widths
                        l = round(x * -(32 + r) / (the x furthest from 0)), -32..31;  scale = sum w l x / sum w l^2
                    keeping the largest (sum w l x)^2 / sum w l^2, which is the least squared error; r from -0.9 to 0.9

    2. The block's d and dmin are the largest scale and minimum over 63 (q6_k: the scale of largest magnitude / -128),
       and the integers of the sub-groups are the nearest multiples.
    3. The codes are chosen again for the scales as stored: round((x + dmin * mn) / (d * sc)), where d is a float16.
       Sub-groups with d * sc = 0 keep the codes of the search. A d beyond 65504 is stored as infinite.

Source: `quantize_row_q4_K_ref`, `quantize_row_q5_K_ref`, `quantize_row_q6_K_ref`, `make_qkx2_quants` and
`make_qx_quants` in ggml-quants.c of llama.cpp, which is what its `llama-quantize` does without an importance matrix.
Exactness: the bytes are those of that C code without fused multiply-add, as in the builds for x86-64 on PyPI: sums are
added in the order of the weights, and every product and sum is rounded. Built with fused multiply-add, the C code
writes other bytes in up to 2 % of the blocks; the root mean square errors of the two then agree to 3 digits. One
difference is meant: a quotient beyond 4194303 is cut to the range of codes here, while there it gives any code, for
its rounding then reads the wrong bits. It takes q5_k and sub-groups far apart in a block but constant in themselves to
the last bit of float32.

The weights lie as [l, M], l the place in the sub-group and M the sub-groups of many blocks: sums over l are then
sums of rows, in order, and every sub-group searches at the same time. M is cut so that a step stays in the cache.

Not chosen: torch.sum, which adds in pairs and so gives other bits; a search over all weights of importance (the
`_impl` functions of the C code), which asks for calibration that merging does better on the layer's outputs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qgraft.formats.grid import Grid

# Shapes: N blocks of S sub-groups of W weights; M = N * S sub-groups; WM has the place in the sub-group first.
_BLOCKS_AT_ONCE = 256
_SMALLEST = 1e-15  # q6_k: what is smaller counts as zero


def fit_q4_k(x_NQ: Tensor) -> Grid:
    """The grid of blocks x [N, 256] float32."""
    return _in_parts(x_NQ, partial(_fit_affine, 15, _widths(x_NQ, 15, start=-1.0, count=21)))


def fit_q5_k(x_NQ: Tensor) -> Grid:
    """The grid of blocks x [N, 256] float32."""
    return _in_parts(x_NQ, partial(_fit_affine, 31, _widths(x_NQ, 31, start=-0.5, count=16)))


def fit_q6_k(x_NQ: Tensor) -> Grid:
    """The grid of blocks x [N, 256] float32."""
    return _in_parts(x_NQ, _fit_signed)


def _in_parts(x_NQ: Tensor, fit: Callable[[Tensor], Grid]) -> Grid:
    """The grid of all blocks, fitted a few at a time."""
    grids = [fit(part) for part in x_NQ.split(_BLOCKS_AT_ONCE)]

    def join(name: str) -> Tensor:
        return torch.cat([getattr(grid, name) for grid in grids])

    first = grids[0]
    m, minimums = (None, None) if first.m is None else (join("m"), join("sub_minimums"))
    return Grid(join("codes"), join("d"), m, join("sub_scales"), minimums, low=first.low, high=first.high)


def _widths(like: Tensor, largest: int, start: float, count: int) -> Tensor:
    """largest + r for r = start, start + 0.1, ...: [count] float32, each step rounded as in the C code."""
    tenth = torch.full((), 0.1, dtype=torch.float32, device=like.device)
    return torch.arange(count, dtype=torch.float32, device=like.device) * tenth + start + largest


# ---------------------------------------------------------------- q4_k, q5_k: scale and minimum


def _fit_affine(largest: int, widths: Tensor, x_NQ: Tensor) -> Grid:
    """Steps 1 to 3 of q4_k and q5_k."""
    blocks = len(x_NQ)
    x_WM = x_NQ.reshape(blocks * 8, 32).T.contiguous()
    scale, minimum, codes_WM = _search_affine(x_WM, largest, widths)
    d, sub_scales = _to_six_bits(scale.view(blocks, 8))
    dmin, sub_minimums = _to_six_bits(0 - minimum.view(blocks, 8))  # not -minimum: no negative zeros
    steps_M = (d.half().float() * sub_scales).view(-1)
    offsets_M = (dmin.half().float() * sub_minimums).view(-1)
    again_WM = ((x_WM + offsets_M) / steps_M).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(0, largest)
    codes_WM = torch.where(steps_M == 0, codes_WM, again_WM)
    codes_NQ = codes_WM.T.to(torch.int8).reshape(blocks, 256)
    return Grid(codes_NQ, d, -dmin, sub_scales.to(torch.int8), sub_minimums.to(torch.int8), low=0, high=largest)


def _search_affine(x_WM: Tensor, largest: int, widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step 1 of q4_k and q5_k: scale [M], minimum [M] and codes [W, M] of every sub-group, float32."""
    root_mean = (_sum_rows(x_WM * x_WM) / 32).double().sqrt().float()  # torch's root of float32 is not the nearest
    w_WM = x_WM.abs() + root_mean
    sum_w, sum_x = _sum_rows(w_WM), _sum_rows(w_WM * x_WM)
    top, minimum = x_WM.amax(dim=0), x_WM.amin(dim=0).clamp_(max=0.0)
    inverse = torch.full_like(top, largest) / (top - minimum)
    scale = torch.ones_like(top) / inverse  # 0 where all x are equal: the error is then 0, and nothing is better
    codes_WM = _codes(x_WM, minimum, inverse, largest)
    error = _weighted_error(x_WM, w_WM, codes_WM, scale, minimum)
    best = inverse, minimum
    for width in widths:
        inverse = width / (top - minimum)
        codes_WM = _codes(x_WM, minimum, inverse, largest)
        wl_WM = w_WM * codes_WM
        sum_l, sum_l2, sum_xl = _sum_rows(torch.stack([wl_WM, wl_WM * codes_WM, wl_WM * x_WM], dim=1))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_minimum > 0
        new_scale = torch.where(above, sum_xl / sum_l2, new_scale)
        new_minimum = torch.where(above, 0.0, new_minimum)
        new_error = _weighted_error(x_WM, w_WM, codes_WM, new_scale, new_minimum)
        better = (determinant > 0) & (new_error < error)
        best = torch.where(better, inverse, best[0]), torch.where(better, minimum, best[1])
        error, scale = torch.where(better, new_error, error), torch.where(better, new_scale, scale)
        minimum = torch.where(better, new_minimum, minimum)
    return scale, minimum, _codes(x_WM, best[1], best[0], largest).nan_to_num_(nan=0.0)


def _codes(x_WM: Tensor, minimum: Tensor, inverse: Tensor, largest: int) -> Tensor:
    """round((x - minimum) * inverse) within 0..largest, all 0 where the inverse is infinite, [W, M] float32."""
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    return (x_WM - minimum).mul_(inverse).round_().clamp_(0, largest)


def _weighted_error(x_WM: Tensor, w_WM: Tensor, codes_WM: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """sum w (scale * l + minimum - x)^2 of each sub-group, [M]."""
    difference = (codes_WM * scale).add_(minimum).sub_(x_WM)
    return _sum_rows(difference.mul_(difference).mul_(w_WM))


def _to_six_bits(real_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Step 2 of q4_k and q5_k: real numbers >= 0 -> the block's factor [N, 1] and integers 0..63 [N, S], float32."""
    most = real_NS.amax(dim=1, keepdim=True)
    sixty_three = torch.full_like(most, 63.0)
    inverse = torch.where(most > 0, sixty_three / most, 0.0)
    return most / sixty_three, (real_NS * inverse).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(0, 63)


# ---------------------------------------------------------------- q6_k: scale only


def _fit_signed(x_NQ: Tensor) -> Grid:
    """Steps 1 to 3 of q6_k."""
    blocks = len(x_NQ)
    x_WM = x_NQ.reshape(blocks * 16, 16).T.contiguous()
    scale_NS, codes_WM = _search_signed(x_WM)
    scale_NS = scale_NS.view(blocks, 16).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    largest = scale_NS.gather(1, scale_NS.abs().argmax(dim=1, keepdim=True))  # [N, 1], the first of equals
    zero = largest.abs() < _SMALLEST
    inverse = torch.full_like(largest, -128.0) / largest
    d = torch.where(zero, 0.0, torch.ones_like(largest) / inverse)
    sub_scales = torch.where(zero, 0.0, (scale_NS * inverse).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-128, 127))
    steps_M = (d.half().float() * sub_scales).view(-1)
    again_WM = (x_WM / steps_M).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-32, 31)
    codes_WM = torch.where(steps_M == 0, codes_WM, again_WM)
    codes_NQ = torch.where(zero, -32, codes_WM.T.to(torch.int8).reshape(blocks, 256))  # the C code stores 0 there
    return Grid(codes_NQ.to(torch.int8), d, sub_scales=sub_scales.to(torch.int8), low=-32, high=31)


def _search_signed(x_WM: Tensor) -> tuple[Tensor, Tensor]:
    """Step 1 of q6_k: scale [M] and codes [W, M] of every sub-group, float32."""
    furthest = x_WM.gather(0, x_WM.abs().argmax(dim=0, keepdim=True))[0]
    zero = furthest.abs() < _SMALLEST
    w_WM = x_WM * x_WM
    wx_WM = w_WM * x_WM
    scale = best = best_inverse = torch.zeros_like(furthest)
    tenth = torch.full((), 0.1, dtype=torch.float32, device=x_WM.device)
    for tenths in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(tenth * tenths + 32) / furthest
        codes_WM = _signed_codes(x_WM, inverse)
        terms = torch.stack([wx_WM * codes_WM, (w_WM * codes_WM).mul_(codes_WM)], dim=1)
        sum_xl, sum_l2 = _sum_rows(terms)
        new_scale = sum_xl / sum_l2
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        if tenths == 0:
            best_inverse, better = inverse, sum_l2 != 0
        scale = torch.where(better, new_scale, scale)
        best = torch.where(better, new_scale * sum_xl, best)
        best_inverse = torch.where(better, inverse, best_inverse)
    codes_WM = torch.where(zero, -32.0, _signed_codes(x_WM, best_inverse).nan_to_num_(nan=0.0))
    return torch.where(zero, 0.0, scale), codes_WM


def _signed_codes(x_WM: Tensor, inverse: Tensor) -> Tensor:
    return (x_WM * inverse).round_().clamp_(-32, 31)


def _sum_rows(terms: Tensor) -> Tensor:
    """[W, ...] -> [...], added in order."""
    total = terms[0].clone()
    for row in terms[1:].unbind():
        total += row
    return total
