# mypy: disable-error-code="no-untyped-def, no-redef"
"""Triton: products of the experts of a mixture, whose rows are sorted by their experts. Imported by gpu_experts.py only.

    bounds [E + 1] int64    rows bounds[e] to bounds[e + 1] are those of expert e. They are read from the GPU's memory, and
                            the CPU need not know them: a launch has as many programs as any bounds need
    tokens [R] int64        the token of each row: with SOME a kernel takes rows of tokens first <= t < last only

Numbers of a matrix y lie `y_row` apart from row to row and `y_column` from column to column, and so on: x and y may be parts
of wider matrices, and a weight is read along either side. Columns of x are neighbours.
"""

import triton
import triton.language as tl

from qgraft.kernels.triton_blocks import rounded
from qgraft.kernels.triton_gemv import dots

jit = triton.jit


@jit
def tile_rows(bounds, E, EP: tl.constexpr, BM: tl.constexpr):
    """(expert, the rows [BM] of tile program_id(1) of all experts' tiles, where its rows end); expert >= E: no such tile."""
    e = tl.arange(0, EP)
    begins = tl.load(bounds + e, mask=e < E, other=0).to(tl.int32)
    ends = tl.load(bounds + e + 1, mask=e < E, other=0).to(tl.int32)
    tiles = (ends - begins + BM - 1) // BM
    before = tl.cumsum(tiles, 0)
    expert = tl.sum((before <= tl.program_id(1)).to(tl.int32), axis=0)
    is_own = e == expert
    number = tl.program_id(1) - tl.sum(tl.where(is_own, before - tiles, 0), axis=0)
    begin = tl.sum(tl.where(is_own, begins, 0), axis=0)
    end = tl.sum(tl.where(is_own, ends, 0), axis=0)
    return expert, begin + number * BM + tl.arange(0, BM), end


@jit
def factor(p, at, ok, EXACT: tl.constexpr):
    """Numbers to multiply: the interpreter multiplies float32 only."""
    x = tl.load(p + at, mask=ok, other=0)
    return x.to(tl.float32) if EXACT else x


@jit
def grouped_kernel(
    x, w, y, bounds, tokens, first, last, E, N, K, x_row, w_expert, w_n, w_k, y_row, y_column,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, SOME: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """y = x W_e^T, or y += with ADD, in one float32 sum. One program: BN outputs of BM rows of an expert."""
    expert, r, end = tile_rows(bounds, E, EP, BM)
    if expert < E:
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        row = r.to(tl.int64)
        ok = r < end
        if SOME:
            token = tl.load(tokens + row, mask=ok, other=-1)
            ok = ok & (token >= first) & (token < last)
        acc = tl.zeros((BM, BN), tl.float32)
        start = w + expert.to(tl.int64) * w_expert
        for at in range(0, K, BK):
            c = at + k
            a = factor(x, row[:, None] * x_row + c[None, :], ok[:, None] & (c < K)[None, :], EXACT)
            b = factor(start, n[None, :] * w_n + c[:, None] * w_k, (n < N)[None, :] & (c < K)[:, None], EXACT)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        out = y + row[:, None] * y_row + n[None, :] * y_column
        take = ok[:, None] & (n < N)[None, :]
        if ADD:
            acc += tl.load(out, mask=take, other=0).to(tl.float32)
        tl.store(out, rounded(acc, y.dtype.element_ty, EXACT), mask=take)


@jit
def outer_kernel(
    a, b, out, bounds, tokens, first, last, scaling, M, N, a_row, b_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SOME: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out [E, M, N] float32: s a^T b over the rows of each expert, 0 for one without. One program: a part [BM, BN] of one."""
    expert = tl.program_id(2).to(tl.int64)
    begin = tl.load(bounds + expert).to(tl.int32)
    end = tl.load(bounds + expert + 1).to(tl.int32)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(begin, end, BK):
        row = (at + tl.arange(0, BK)).to(tl.int64)
        ok = row < end
        if SOME:
            token = tl.load(tokens + row, mask=ok, other=-1)
            ok = ok & (token >= first) & (token < last)
        left = factor(a, row[None, :] * a_row + m[:, None], ok[None, :] & (m < M)[:, None], EXACT)
        right = factor(b, row[:, None] * b_row + n[None, :], ok[:, None] & (n < N)[None, :], EXACT)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    take = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + (expert * M + m[:, None]) * N + n[None, :], acc * scaling, mask=take)


@jit
def few_kernel(
    x, p8, p16, beside, y, experts, rows, units, row_bytes, K, y_row, y_column,
    F: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, NU: tl.constexpr, ADD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y[m] = W_e x[m], or y[m] += with ADD, for m = program_id(1) and its expert, of `rows` rows in the stack; x [R, K]."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.load(experts + m).to(tl.int32) * rows
    total = dots(x + m * K, p8, p16, beside, first + n, first + rows, units, row_bytes, K, F, RUN, BN, NU)
    out = y + m * y_row + n * y_column
    if ADD:
        total += tl.load(out, mask=n < rows, other=0).to(tl.float32)
    tl.store(out, rounded(total, y.dtype.element_ty, EXACT), mask=n < rows)
