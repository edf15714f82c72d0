# mypy: disable-error-code="no-untyped-def, no-redef"
"""Triton: weights that are places in a table of points, iq1 to iq3, and digits of base 3, tq1_0. See triton_blocks.py.

A run is 16 weights: part 0 or 1 of the 32 weights k of a block of 256. What a place in the table is worth is read from
memory, a byte for each weight: the largest table has 16 KB, which stay in the cache next to the arithmetic. The bit layouts
are in formats/lattices.py and formats/ternary.py.
"""

import triton
import triton.language as tl

jit = triton.jit


@jit
def byte(p8, at, ok):
    """One stored byte as int32."""
    return tl.load(p8 + at, mask=ok, other=0).to(tl.int32)


@jit
def signed(q):
    """The int8 that the byte q is."""
    return q - ((q & 128) << 1)


@jit
def half(p16, at, ok):
    """The float16 at byte `at`, which is even, as float32."""
    return tl.load(p16 + at // 2, mask=ok, other=0).to(tl.float32)


@jit
def lattice_bytes(F: tl.constexpr):
    """Of a block."""
    if F == "iq1_s":
        return 50
    elif F == "iq1_m":
        return 56
    elif F == "iq2_xxs":
        return 66
    elif F == "iq2_xs":
        return 74
    elif F == "iq2_s":
        return 82
    elif F == "iq3_xxs":
        return 98
    else:
        tl.static_assert(F == "iq3_s")
        return 110


@jit
def base_3(p8, at, n, ok):
    """Digit n of a block of tq1_0, less 1."""
    m = tl.where(n < 160, n, tl.where(n < 240, n - 160, n - 240))
    width = tl.where(n < 160, 32, tl.where(n < 240, 16, 4))
    b = byte(p8, at + tl.where(n < 160, 0, tl.where(n < 240, 32, 48)) + m % width, ok)
    k = m // width
    power = tl.where(k == 0, 1, tl.where(k == 1, 3, tl.where(k == 2, 9, tl.where(k == 3, 27, 81))))
    return ((((b * power) & 255) * 3 >> 8) - 1).to(tl.float32)


@jit
def word(p8, at, ok):
    """Two stored bytes as int32, the lower one first."""
    return byte(p8, at, ok) | (byte(p8, at + 1, ok) << 8)


@jit
def minus(signs, i):
    """Bit i of 8: 1 for minus."""
    return (signs >> i) & 1


@jit
def even_minus(signs, i):
    """The same of 7 bits, to which the eighth makes their number even."""
    parity = signs ^ (signs >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return tl.where(i == 7, parity, (signs >> i) & 1)


@jit
def code(table, place, i, is_minus, ok, WIDTH: tl.constexpr):
    """Number i of a point, with its sign."""
    value = tl.load(table + place * WIDTH + i, mask=ok, other=0).to(tl.int32)
    return tl.where(is_minus == 1, -value, value)


@jit
def run_of_lattice(F: tl.constexpr, p8, p16, table, at, k, PART: tl.constexpr, j, ok):
    """float32 weights j [16] of the run; `at` is where the block begins."""
    n = PART * 16 + j  # of the 32 weights
    i = n % 8
    eighth = n // 8  # of 4: whose signs, and in iq1 and iq2 whose point
    inside = ok & (j < 16)
    if F == "iq1_s" or F == "iq1_m":
        if F == "iq1_s":
            d = half(p16, at, ok)
            qh = word(p8, at + 34 + 2 * k, ok)
            v = (qh >> 12) & 7
            high = (qh >> (3 * eighth)) & 7
            is_minus = qh >> 15
            low = byte(p8, at + 2 + 4 * k + eighth, inside)
        else:
            b0 = byte(p8, at + 49, ok) >> 4  # d: 4 bits of each of four words
            b1 = byte(p8, at + 51, ok) & 240
            b2 = (byte(p8, at + 53, ok) & 240) << 4
            b3 = (byte(p8, at + 55, ok) & 240) << 8
            d = (b0 | b1 | b2 | b3).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            s = 2 * k + PART
            v = (word(p8, at + 48 + 2 * (s // 4), ok) >> (3 * (s % 4))) & 7
            nibble = byte(p8, at + 32 + 2 * k + eighth // 2, inside) >> (4 * (eighth % 2))
            high = nibble & 7
            is_minus = (nibble >> 3) & 1
            low = byte(p8, at + 4 * k + eighth, inside)
        value = 8 * code(table, low | (high << 8), i, 0, inside, 8) + 1 - 2 * is_minus
        return (d * 0.125) * ((2 * v + 1) * value).to(tl.float32)
    elif F == "iq2_xxs" or F == "iq3_xxs":
        WORD: tl.constexpr = 2 + 4 if F == "iq2_xxs" else 66
        STEP: tl.constexpr = 8 if F == "iq2_xxs" else 4
        start = at + WORD + STEP * k
        bit = 7 * eighth
        signs = (word(p8, start + bit // 8, inside) >> (bit % 8)) & 127
        v = byte(p8, start + 3, ok) >> 4
        is_minus = even_minus(signs, i)
        if F == "iq2_xxs":
            q = code(table, byte(p8, at + 2 + 8 * k + eighth, inside), i, is_minus, inside, 8)
            return (half(p16, at, ok) * 0.125) * ((2 * v + 1) * q).to(tl.float32)
        else:
            q = code(table, byte(p8, at + 2 + 8 * k + n // 4, inside), n % 4, is_minus, inside, 4)
            return (half(p16, at, ok) * 0.25) * ((2 * v + 1) * q).to(tl.float32)
    elif F == "iq3_s":
        v = (byte(p8, at + 106 + k // 2, ok) >> (4 * (k % 2))) & 15
        high = (byte(p8, at + 66 + k, ok) >> (n // 4)) & 1
        place = byte(p8, at + 2 + 8 * k + n // 4, inside) | (high << 8)
        is_minus = minus(byte(p8, at + 74 + 4 * k + eighth, inside), i)
        return half(p16, at, ok) * ((2 * v + 1) * code(table, place, n % 4, is_minus, inside, 4)).to(tl.float32)
    else:
        SCALES: tl.constexpr = 66 if F == "iq2_xs" else 74
        v = (byte(p8, at + SCALES + k, ok) >> (4 * PART)) & 15
        if F == "iq2_xs":
            q = word(p8, at + 2 + 8 * k + 2 * eighth, inside)
            place = q & 511
            is_minus = even_minus(q >> 9, i)
        else:
            tl.static_assert(F == "iq2_s")
            high = (byte(p8, at + 66 + k, ok) >> (2 * eighth)) & 3
            place = byte(p8, at + 2 + 4 * k + eighth, inside) | (high << 8)
            is_minus = minus(byte(p8, at + 34 + 4 * k + eighth, inside), i)
        return (half(p16, at, ok) * 0.125) * ((2 * v + 1) * code(table, place, i, is_minus, inside, 8)).to(tl.float32)
