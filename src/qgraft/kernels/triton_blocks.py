# mypy: disable-error-code="no-untyped-def, no-redef"
"""Triton: how each packed format is read on a GPU, and the kernel that unpacks it. Imported by triton_ops.py only.

A unit is two runs of neighbouring weights that share bytes or lie side by side: part 0 and part 1, RUN weights each. One
description of it, `unit`, serves unpacking and the product with few rows.

    format        bytes of a block  RUN  units     part 0 -> columns       part 1 -> columns
    q4_0 q4_1            18 20       16    1       low nibble   j          high nibble   j + 16
    q5_0 q5_1            22 24       16    1       the same, with a fifth bit each
    q8_0                  34         16    1       byte         j          byte          j + 16
    q4_k q5_k           144 176      32    4       low nibble   j          high nibble   j + 32
    q2_k q3_k q6_k     84 110 210    16    8       lower bits   j          higher bits   j + 64
    iq4_nl mxfp4         18 17       16    1       a level of the low nibble j    of the high one  j + 16
    iq4_xs               136         16    8       likewise
    nvfp4                 36          8    4       likewise     j                  j + 8
    tq2_0                 66         16    8       as q2_k
    tq1_0 iq1 iq2 iq3  54  50 ..     16    8       weight       j          weight        j + 16  (triton_lattices.py)
    chatglm-int4          16         16    1       high nibble  2 j        low nibble    2 j + 1      a row's scale beside it
    chatglm-int8          32         16    1       byte         j          byte          j + 16       its end anywhere

Every product of a scale and a code is exact in float32 or rounded once, so that a fused multiply-add gives the same bits as
the reference: d has 11 bits, a code 4 to 8, the integer of a sub-group 4 to 8.

`EXACT` is Triton's interpreter, which the tests run these kernels in without a GPU. There bfloat16 is made by cutting bits
off, so numbers are rounded in float32 first (`rounded`); on a GPU the branch is compiled away.
"""

import triton
import triton.language as tl

from qgraft.kernels.triton_lattices import base_3, byte, half, lattice_bytes, run_of_lattice, signed

jit = triton.jit


@jit
def rounded(x, DT: tl.constexpr, EXACT: tl.constexpr):
    """float32 x as DT, to nearest, ties to even."""
    if EXACT and tl.bfloat16 == DT:
        b = x.to(tl.uint32, bitcast=True)
        r = (b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000
        r = tl.where(x == x, r, b | 0x400000)
        return r.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DT)


@jit
def column(F: tl.constexpr, g, j):
    """Where weight j of part 0 of unit g lies in its row."""
    if F == "q4_k" or F == "q5_k":
        return g * 64 + j
    elif F == "nvfp4":
        return g * 16 + j
    elif F == "q2_k" or F == "q3_k" or F == "q6_k" or F == "tq2_0":
        return (g // 8) * 256 + ((g % 8) // 4) * 128 + ((g % 4) // 2) * 32 + (g % 2) * 16 + j
    elif F == "chatglm-int4":
        return g * 32 + 2 * j
    else:
        return g * 32 + j


@jit
def apart(F: tl.constexpr):
    """From part 0's column to part 1's."""
    if F == "q4_k" or F == "q5_k":
        return 32
    elif F == "nvfp4":
        return 8
    elif F == "q2_k" or F == "q3_k" or F == "q6_k" or F == "tq2_0":
        return 64
    elif F == "chatglm-int4":
        return 1
    else:
        return 16


@jit
def six_bit_pair(p8, at, s, ok):
    """(scale, minimum) of sub-group s of q4_k or q5_k; `at` is where their 12 bytes begin."""
    low = s < 4
    a = byte(p8, at + tl.where(low, s, s - 4), ok)  # bytes 0..3
    b = byte(p8, at + tl.where(low, s + 4, s), ok)  # bytes 4..7
    c = byte(p8, at + tl.where(low, s + 8, s + 4), ok)  # bytes 8..11
    scale = tl.where(low, a & 63, (c & 15) | ((a >> 2) & 48))
    minimum = tl.where(low, b & 63, (c >> 4) | ((b >> 2) & 48))
    return scale.to(tl.float32), minimum.to(tl.float32)


@jit
def six_bit_scale(p8, at, s, ok):
    """The scale of sub-group s of q3_k; `at` is where the 12 bytes begin."""
    low = byte(p8, at + s % 8, ok)
    high = byte(p8, at + 8 + s % 4, ok)
    code = ((low >> (4 * (s // 8))) & 15) | (((high >> (2 * (s // 4))) & 3) << 4)
    return (code - 32).to(tl.float32)


@jit
def level_nl(q):
    """The level of iq4 of the code q: a byte of four words."""
    word = tl.where(q < 4, -1079142271, tl.where(q < 8, -152379953, tl.where(q < 12, 639175937, 1901675829)))
    return signed((word >> (8 * (q & 3))) & 255).to(tl.float32)


@jit
def level_e2m1(q):
    """The doubled float of 4 bits: a sign, 2 bits of exponent, one of mantissa."""
    mantissa = q & 1
    exponent = (q >> 1) & 3
    size = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.where(exponent == 0, 0, exponent - 1))
    return tl.where(q < 8, size, -size).to(tl.float32)


@jit
def level(F: tl.constexpr, q):
    """What the code q stands for."""
    if F == "mxfp4" or F == "nvfp4":
        return level_e2m1(q)
    else:
        return level_nl(q)


@jit
def power_of_two(e):
    """2^(e - 128), the two smallest of which are subnormal."""
    small = e < 2
    bits = tl.where(small, 0x200000 << tl.where(small, e, 0), (e - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@jit
def half_of_e4m3(e):
    """Half of the float of 8 bits without a sign; 0 where NaN would be."""
    exponent = (e >> 3) & 15
    mantissa = e & 7
    normal = (((exponent + 119) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.0009765625, normal)
    return tl.where(e == 127, 0.0, value)


@jit
def unit_of_levels(F: tl.constexpr, p8, p16, row, g, j, ok):
    """`unit` of iq4_nl, iq4_xs, mxfp4 and nvfp4."""
    if F == "iq4_nl":
        at = row + g * 18
        d = half(p16, at, ok)
        q = byte(p8, at + 2 + j, ok & (j < 16))
    elif F == "mxfp4":
        at = row + g * 17
        d = power_of_two(byte(p8, at, ok))
        q = byte(p8, at + 1 + j, ok & (j < 16))
    elif F == "nvfp4":
        at = row + (g // 4) * 36
        d = half_of_e4m3(byte(p8, at + g % 4, ok))
        q = byte(p8, at + 4 + (g % 4) * 8 + j, ok & (j < 8))
    else:
        tl.static_assert(F == "iq4_xs")
        at = row + (g // 8) * 136
        k = g % 8
        low = (byte(p8, at + 4 + k // 2, ok) >> (4 * (k % 2))) & 15
        high = (byte(p8, at + 2 + k // 4, ok) >> (2 * (k % 4))) & 3
        d = half(p16, at, ok) * ((low | (high << 4)) - 32).to(tl.float32)
        q = byte(p8, at + 8 + 16 * k + j, ok & (j < 16))
    return d * level(F, q & 15), d * level(F, q >> 4)


@jit
def unit_of_4(F: tl.constexpr, p8, p16, row, g, j, ok):
    """`unit` of q4_k and q5_k."""
    SIZE: tl.constexpr = 144 if F == "q4_k" else 176
    at = row + (g // 4) * SIZE
    u = g % 4
    d = half(p16, at, ok)
    dmin = half(p16, at + 2, ok)
    s0, m0 = six_bit_pair(p8, at + 4, 2 * u, ok)
    s1, m1 = six_bit_pair(p8, at + 4, 2 * u + 1, ok)
    q = byte(p8, at + (SIZE - 128) + u * 32 + j, ok & (j < 32))
    q0 = q & 15
    q1 = q >> 4
    if F == "q5_k":
        h = byte(p8, at + 16 + j, ok & (j < 32))
        q0 = q0 | (((h >> (2 * u)) & 1) << 4)
        q1 = q1 | (((h >> (2 * u + 1)) & 1) << 4)
    return (d * s0) * q0.to(tl.float32) - dmin * m0, (d * s1) * q1.to(tl.float32) - dmin * m1


@jit
def unit_of_8(F: tl.constexpr, p8, p16, row, g, j, ok):
    """`unit` of q2_k, q3_k, q6_k and tq2_0."""
    SIZE: tl.constexpr = 84 if F == "q2_k" else (110 if F == "q3_k" else (66 if F == "tq2_0" else 210))
    at = row + (g // 8) * SIZE
    side = (g % 8) // 4  # which 128 of the block's 256 weights
    quarter = (g % 4) // 2
    e = g % 2
    s = side * 8 + quarter * 2 + e  # sub-group of part 0; that of part 1 is four further
    if F == "q6_k":
        d = half(p16, at + 208, ok)
        s0 = signed(byte(p8, at + 192 + s, ok)).to(tl.float32)
        s1 = signed(byte(p8, at + 196 + s, ok)).to(tl.float32)
        q = byte(p8, at + side * 64 + quarter * 32 + e * 16 + j, ok & (j < 16))
        h = byte(p8, at + 128 + side * 32 + e * 16 + j, ok & (j < 16))
        q0 = ((q & 15) | (((h >> (2 * quarter)) & 3) << 4)) - 32
        q1 = ((q >> 4) | (((h >> (4 + 2 * quarter)) & 3) << 4)) - 32
        return (d * s0) * q0.to(tl.float32), (d * s1) * q1.to(tl.float32)
    elif F == "tq2_0":
        d = half(p16, at + 64, ok)
        q = byte(p8, at + side * 32 + e * 16 + j, ok & (j < 16))
        q0 = ((q >> (2 * quarter)) & 3) - 1
        q1 = ((q >> (4 + 2 * quarter)) & 3) - 1
        return d * q0.to(tl.float32), d * q1.to(tl.float32)
    elif F == "q2_k":
        d = half(p16, at + 80, ok)
        dmin = half(p16, at + 82, ok)
        b0 = byte(p8, at + s, ok)
        b1 = byte(p8, at + s + 4, ok)
        q = byte(p8, at + 16 + side * 32 + e * 16 + j, ok & (j < 16))
        q0 = ((q >> (2 * quarter)) & 3).to(tl.float32)
        q1 = ((q >> (4 + 2 * quarter)) & 3).to(tl.float32)
        w0 = (d * (b0 & 15).to(tl.float32)) * q0 - dmin * (b0 >> 4).to(tl.float32)
        w1 = (d * (b1 & 15).to(tl.float32)) * q1 - dmin * (b1 >> 4).to(tl.float32)
        return w0, w1
    else:
        tl.static_assert(F == "q3_k")
        d = half(p16, at + 108, ok)
        s0 = six_bit_scale(p8, at + 96, s, ok)
        s1 = six_bit_scale(p8, at + 96, s + 4, ok)
        q = byte(p8, at + 32 + side * 32 + e * 16 + j, ok & (j < 16))
        h = byte(p8, at + e * 16 + j, ok & (j < 16))  # a bit that is 0 takes 4 off
        k = side * 4 + quarter
        q0 = ((q >> (2 * quarter)) & 3) - ((((h >> k) & 1) ^ 1) << 2)
        q1 = ((q >> (4 + 2 * quarter)) & 3) - ((((h >> (k + 2)) & 1) ^ 1) << 2)
        return (d * s0) * q0.to(tl.float32), (d * s1) * q1.to(tl.float32)


@jit
def unit(F: tl.constexpr, p8, p16, beside, r, row_bytes, g, j, K, ok):
    """float32 weights (part 0, part 1) of unit g of row r.

    Shapes broadcast: r [rows, 1, 1], g [1, units, 1], j [1, 1, RUN]; `ok` where row and unit exist. `beside` are the rows'
    scales, or the table of the format (triton_ops.stored).
    """
    row = r.to(tl.int64) * row_bytes
    if F == "iq4_nl" or F == "iq4_xs" or F == "mxfp4" or F == "nvfp4":
        return unit_of_levels(F, p8, p16, row, g, j, ok)
    elif F == "q2_k" or F == "q3_k" or F == "q6_k" or F == "tq2_0":
        return unit_of_8(F, p8, p16, row, g, j, ok)
    elif F == "q4_k" or F == "q5_k":
        return unit_of_4(F, p8, p16, row, g, j, ok)
    elif F == "tq1_0":
        at = row + (g // 8) * 54
        d = half(p16, at + 52, ok)
        return d * base_3(p8, at, (g % 8) * 32 + j, ok), d * base_3(p8, at, (g % 8) * 32 + 16 + j, ok)
    elif (F == "iq1_s" or F == "iq1_m" or F == "iq2_xxs" or F == "iq2_xs" or F == "iq2_s" or F == "iq3_xxs"
          or F == "iq3_s"):  # fmt: skip
        at = row + (g // 8) * lattice_bytes(F)
        k = g % 8
        w0 = run_of_lattice(F, p8, p16, beside, at, k, 0, j, ok)
        return w0, run_of_lattice(F, p8, p16, beside, at, k, 1, j, ok)
    elif F == "q4_0" or F == "q4_1":
        SIZE: tl.constexpr = 18 if F == "q4_0" else 20
        at = row + g * SIZE
        d = half(p16, at, ok)
        q = byte(p8, at + (SIZE - 16) + j, ok & (j < 16))
        if F == "q4_0":
            return d * ((q & 15) - 8).to(tl.float32), d * ((q >> 4) - 8).to(tl.float32)
        else:
            m = half(p16, at + 2, ok)
            return d * (q & 15).to(tl.float32) + m, d * (q >> 4).to(tl.float32) + m
    elif F == "q5_0" or F == "q5_1":
        SIZE: tl.constexpr = 22 if F == "q5_0" else 24
        at = row + g * SIZE
        d = half(p16, at, ok)
        q = byte(p8, at + (SIZE - 16) + j, ok & (j < 16))
        h0 = byte(p8, at + (SIZE - 20) + j // 8, ok & (j < 16))
        h1 = byte(p8, at + (SIZE - 18) + j // 8, ok & (j < 16))
        q0 = (q & 15) | (((h0 >> (j % 8)) & 1) << 4)
        q1 = (q >> 4) | (((h1 >> (j % 8)) & 1) << 4)
        if F == "q5_0":
            return d * (q0 - 16).to(tl.float32), d * (q1 - 16).to(tl.float32)
        else:
            m = half(p16, at + 2, ok)
            return d * q0.to(tl.float32) + m, d * q1.to(tl.float32) + m
    elif F == "q8_0":
        at = row + g * 34
        d = half(p16, at, ok)
        q0 = signed(byte(p8, at + 2 + j, ok & (j < 16)))
        q1 = signed(byte(p8, at + 18 + j, ok & (j < 16)))
        return d * q0.to(tl.float32), d * q1.to(tl.float32)
    elif F == "chatglm-int4":
        d = tl.load(beside + r, mask=ok, other=0)
        q = byte(p8, row + g * 16 + j, ok & (g * 32 + 2 * j < K))
        return d * (((q >> 4) ^ 8) - 8).to(tl.float32), d * (((q & 15) ^ 8) - 8).to(tl.float32)
    else:
        tl.static_assert(F == "chatglm-int8")
        d = tl.load(beside + r, mask=ok, other=0)
        q0 = signed(byte(p8, row + g * 32 + j, ok & (g * 32 + j < K)))
        q1 = signed(byte(p8, row + g * 32 + 16 + j, ok & (g * 32 + 16 + j < K)))
        return d * q0.to(tl.float32), d * q1.to(tl.float32)


@jit
def dequantize_kernel(
    p8, p16, beside, out, rows, units, row_bytes, K, ld,
    F: tl.constexpr, RUN: tl.constexpr, BR: tl.constexpr, NU: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out [rows, K], rows `ld` numbers apart. One program: BR rows, NU units of each."""
    r = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None, None]
    g = (tl.program_id(1) * NU + tl.arange(0, NU))[None, :, None]
    j = tl.arange(0, RUN)[None, None, :]
    ok = (r < rows) & (g < units)
    w0, w1 = unit(F, p8, p16, beside, r, row_bytes, g, j, K, ok)
    DT: tl.constexpr = out.dtype.element_ty
    start = out + r.to(tl.int64) * ld
    if F == "chatglm-int4":  # neighbours, which go to memory together instead of every second number
        c = g * 32 + tl.arange(0, 32)[None, None, :]
        tl.store(start + c, rounded(tl.interleave(w0, w1), DT, EXACT), mask=ok & (c < K))
    else:
        c = column(F, g, j)
        tl.store(start + c, rounded(w0, DT, EXACT), mask=ok & (c < K))
        tl.store(start + c + apart(F), rounded(w1, DT, EXACT), mask=ok & (c + apart(F) < K))
