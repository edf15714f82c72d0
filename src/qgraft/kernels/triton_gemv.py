# mypy: disable-error-code="no-untyped-def, no-redef"
"""Triton: a packed weight times few rows of x, and what LoRAs add to it. Imported by triton_ops.py and gpu_decode.py only.

Weights go from packed bytes to registers, `unit` by unit as in triton_blocks.py, and are multiplied there in float32. What
unpacks a weight takes eight instructions or more, so a GPU is limited by these and reads a third to a half of what its memory
gives. Codes of four bits read as floats without an exponent, one instruction each, were tried and slower: 18 us for 10 of
4096 x 4096 q4_1 on an H100, because x then is read in strides.
"""

import triton
import triton.language as tl

from qgraft.kernels.triton_blocks import apart, column, rounded, unit

jit = triton.jit


@jit
def dots(
    x, p8, p16, beside, n, rows, units, row_bytes, K,
    F: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, NU: tl.constexpr,
):  # fmt: skip
    """W x for the rows n [BN] of W, float32."""
    r = n[:, None, None]
    j = tl.arange(0, RUN)[None, None, :]
    acc = tl.zeros((BN, NU, RUN), tl.float32)
    for start in range(0, units, NU):
        g = (start + tl.arange(0, NU))[None, :, None]
        ok = (r < rows) & (g < units)
        w0, w1 = unit(F, p8, p16, beside, r, row_bytes, g, j, K, ok)
        c = column(F, g, j)
        x0 = tl.load(x + c, mask=(g < units) & (c < K), other=0).to(tl.float32)
        x1 = tl.load(x + c + apart(F), mask=(g < units) & (c + apart(F) < K), other=0).to(tl.float32)
        acc += w0 * x0 + w1 * x1
    return tl.sum(tl.sum(acc, axis=2), axis=1)


@jit
def added(total, table, h, n, ok, NA: tl.constexpr, R: tl.constexpr):
    """total [BN] and what NA LoRAs add to rows n: B h, with h [NA, R] and B's address and rank from the table."""
    for a in tl.static_range(NA):
        b = tl.load(table + 4 * a + 1).to(tl.pointer_type(tl.float32))
        rank = tl.load(table + 4 * a + 2).to(tl.int32)
        k = tl.arange(0, R)
        coefficients = tl.load(h + a * R + k, mask=k < rank, other=0)
        at = n[:, None].to(tl.int64) * rank + k[None, :]
        values = tl.load(b + at, mask=ok[:, None] & (k < rank)[None, :], other=0)
        total += tl.sum(values * coefficients[None, :], axis=1)
    return total


@jit
def whole(
    total, bias, residual, table, h, m, n, ok, rows,
    BIAS: tl.constexpr, ADD: tl.constexpr, NA: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A product [BN] of token m, and what comes to it: a bias, LoRAs and the residual [M, rows]."""
    if BIAS:
        total += tl.load(bias + n, mask=ok, other=0).to(tl.float32)
    if NA > 0:
        total = added(total, table + m * (NA * 4), h + m * (NA * R), n, ok, NA, R)
    if ADD:
        total += tl.load(residual + m * rows + n, mask=ok, other=0)
    return total


@jit
def gemv_kernel(
    x, p8, p16, beside, y, bias, residual, table, h, rows, units, row_bytes, K, ld,
    F: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, NU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    NA: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y[m] = W x[m] for m = program_id(1), and a bias, LoRAs and the residual [M, rows]; rows of y are `ld` apart."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = n < rows
    total = dots(x + m * K, p8, p16, beside, n, rows, units, row_bytes, K, F, RUN, BN, NU)
    total = whole(total, bias, residual, table, h, m, n, ok, rows, BIAS, ADD, NA, R)
    tl.store(y + m * ld + n, rounded(total, y.dtype.element_ty, EXACT), mask=ok)


@jit
def add_kernel(
    product, y, bias, residual, table, h, rows, ld,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, NA: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The same behind a product [M, rows] that is there already."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = n < rows
    total = tl.load(product + m * rows + n, mask=ok, other=0).to(tl.float32)
    total = whole(total, bias, residual, table, h, m, n, ok, rows, BIAS, ADD, NA, R)
    tl.store(y + m * ld + n, total, mask=ok)


@jit
def down_kernel(x, table, h, M, K, NA: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """h = s A x: one program for row program_id(0) of A, of adapter and token program_id(1) in layers program_id(2).

    The table [layers, M, NA, 4] int64 has of each the addresses of A and B in float32, the rank, and the bits of s; h is
    [layers, M, NA, R], where the layers have the same x [M, K].
    """
    r = tl.program_id(0)
    which = tl.program_id(2) * M * NA + tl.program_id(1)
    m = (tl.program_id(1) // NA).to(tl.int64)
    entry = table + which * 4
    rank = tl.load(entry + 2).to(tl.int32)
    if r < rank:
        a = tl.load(entry).to(tl.pointer_type(tl.float32)) + r.to(tl.int64) * K
        s = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
        acc = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            c = start + tl.arange(0, BLOCK)
            acc += tl.load(a + c, mask=c < K, other=0) * tl.load(x + m * K + c, mask=c < K, other=0)
        tl.store(h + which * R + r, s * tl.sum(acc, axis=0))
