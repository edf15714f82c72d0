# mypy: disable-error-code="no-untyped-def, no-redef"
"""Triton: a packed weight times few rows of x, and what LoRAs add to it. Imported by triton_ops.py and gpu_decode.py only.

A GPU reads 3 TB/s and computes 7 T weights/s at 4 instructions a weight: what unpacks a weight decides, not memory. Most
formats go through `unit` (triton_blocks.py), 8 instructions or more. q4_0 and q4_1 have a way of half as many:

    word      n7 n6 n5 n4 n3 n2 n1 n0         eight codes of 4 bits, n0 lowest
    & mask     0  0 n5  0  0  0  0  0         seen as float32 this is n5 2^20 2^-149, exact: no exponent, or the smallest
    x 2^(C-20)                                so a product with x is n5 x 2^(C-149), whatever the nibble's place

One AND and one fused multiply-add; scale and minimum come once for the codes of a word: d sum(q x) + m sum(x). Numbers below
2^-126 are as fast as others on a GPU. Nothing is rounded but in float32. `C` leaves room for |x| up to 2^37.
"""

import triton
import triton.language as tl

from qgraft.kernels.triton_blocks import apart, column, half, rounded, unit

jit = triton.jit
C = tl.constexpr(90)  # and BACK is 2^(149 - C)
BACK = tl.constexpr(2.0**59)


@jit
def byte_times(word, x, S: tl.constexpr, HIGH: tl.constexpr):
    """x times the code at bit HIGH, 0 or 4, of byte S of the word, times 2^(C - 149)."""
    AT: tl.constexpr = (8 * S if S < 3 else 16) + HIGH
    MASK: tl.constexpr = 15 << AT
    SCALE: tl.constexpr = 2.0 ** (C - AT)
    here = word if S < 3 else word >> 8  # a code must end below bit 24
    return (here & MASK).to(tl.float32, bitcast=True) * (x * SCALE)


@jit
def word_sums(x, word, c, ok, BITS: tl.constexpr):
    """Of words of BITS bits: the sum of their codes times x, times 2^(C - 149), and that of x.

    Shapes: word [BN, NU, W]; c [1, NU, W], the column of the first byte's low code, 16 before that of its high one.
    """
    codes = tl.zeros(word.shape, tl.float32)
    numbers = tl.zeros(c.shape, tl.float32)
    for s in tl.static_range(BITS // 8):
        x0 = tl.load(x + c + s, mask=ok, other=0).to(tl.float32)
        x1 = tl.load(x + c + (s + 16), mask=ok, other=0).to(tl.float32)
        codes += byte_times(word, x0, s, 0)
        codes += byte_times(word, x1, s, 4)
        numbers += x0 + x1
    return codes, numbers


@jit
def dots(
    x, p8, p16, scale, n, rows, units, row_bytes, K,
    F: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, NU: tl.constexpr,
):  # fmt: skip
    """W x for the rows n [BN] of W, float32."""
    r = n[:, None, None]
    row = r.to(tl.int64) * row_bytes
    if F == "q4_0" or F == "q4_1":
        BITS: tl.constexpr = 16 if F == "q4_0" else 32
        WORDS: tl.constexpr = 8 if F == "q4_0" else 4
        WORD: tl.constexpr = tl.int16 if F == "q4_0" else tl.int32
        words = p8.to(tl.pointer_type(WORD)) + row // (BITS // 8)
        j = tl.arange(0, WORDS)[None, None, :]
        acc = tl.zeros((BN, NU, WORDS), tl.float32)
        for start in range(0, units, NU):
            g = (start + tl.arange(0, NU))[None, :, None]
            ok = (r < rows) & (g < units)
            inside = (g < units) & (j < WORDS)
            if F == "q4_0":
                word = tl.load(words + (g * 9 + 1 + j), mask=ok & (j < WORDS), other=0).to(tl.int32) & 0xFFFF
                codes, numbers = word_sums(x, word, g * 32 + 2 * j, inside, BITS)
                d = half(p16, row + g * 18, ok)
                acc += (d * BACK) * codes - (8.0 * d) * numbers
            else:
                word = tl.load(words + (g * 5 + 1 + j), mask=ok & (j < WORDS), other=0)
                codes, numbers = word_sums(x, word, g * 32 + 4 * j, inside, BITS)
                d = half(p16, row + g * 20, ok)
                m = half(p16, row + g * 20 + 2, ok)
                acc += (d * BACK) * codes + m * numbers
    else:
        j = tl.arange(0, RUN)[None, None, :]
        acc = tl.zeros((BN, NU, RUN), tl.float32)
        for start in range(0, units, NU):
            g = (start + tl.arange(0, NU))[None, :, None]
            ok = (r < rows) & (g < units)
            w0, w1 = unit(F, p8, p16, scale + r, row, g, j, K, ok)
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
def gemv_kernel(
    x, p8, p16, scale, y, bias, residual, table, h, rows, units, row_bytes, K, ld,
    F: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, NU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    NA: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y[m] = W x[m] for m = program_id(1), and a bias, LoRAs and the residual [M, rows]; rows of y are `ld` apart."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = n < rows
    total = dots(x + m * K, p8, p16, scale, n, rows, units, row_bytes, K, F, RUN, BN, NU)
    if BIAS:
        total += tl.load(bias + n, mask=ok, other=0).to(tl.float32)
    if NA > 0:
        total = added(total, table + m * (NA * 4), h + m * (NA * R), n, ok, NA, R)
    if ADD:
        total += tl.load(residual + m * rows + n, mask=ok, other=0)
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
    if BIAS:
        total += tl.load(bias + n, mask=ok, other=0).to(tl.float32)
    if NA > 0:
        total = added(total, table + m * (NA * 4), h + m * (NA * R), n, ok, NA, R)
    if ADD:
        total += tl.load(residual + m * rows + n, mask=ok, other=0)
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
