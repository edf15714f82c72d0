/* 32 codes of a packed row as signed bytes and their scales, in plain C on every level: formats of blocks of 256 weights that
 * are read and not written (kquants.py, ternary.py, lattices.py of formats/, where their bytes are drawn).
 *
 * A weight is step * code, or + minimum; a step belongs to 16 weights.
 */

#ifndef QGRAFT_CHUNKS_H
#define QGRAFT_CHUNKS_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "floats.h"
#include "formats.h"

/* The points of all lattices, 8 or 4 numbers each (lattices.c); those of IQ1 times 8. */
enum { POINTS_IQ1 = 0, POINTS_IQ2_XXS = 16384, POINTS_IQ2_XS = 18432, POINTS_IQ2_S = 22528, POINTS_IQ3_XXS = 30720,
       POINTS_IQ3_S = 31744, POINTS = 33792 };
extern int8_t qgraft_points[POINTS];

ALWAYS_INLINE uint32_t u16_at(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }
ALWAYS_INLINE uint32_t u32_at(const uint8_t *p) { return u16_at(p) | u16_at(p + 2) << 16; }

/* 7 signs -> 8, an even number of them minus. */
ALWAYS_INLINE uint32_t even_signs(uint32_t bits) {
    uint32_t odd = bits ^ bits >> 4;
    odd ^= odd >> 2, odd ^= odd >> 1;
    return bits | (odd & 1) << 7;
}

/* 8 numbers above 0, minus where a bit of `signs` is set. */
ALWAYS_INLINE void store_signed(const int8_t *low, const int8_t *high, uint32_t signs, int8_t *codes) {
    uint64_t points;
    memcpy(&points, low, 4), memcpy((char *)&points + 4, high, 4);
    const uint64_t bits = signs * 0x0101010101010101u & 0x8040201008040201u;
    const uint64_t minus = (bits + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    points = (points ^ minus * 255) + minus; /* no byte is 0, so none carries */
    memcpy(codes, &points, 8);
}

ALWAYS_INLINE void store_eight(int table, uint32_t place, uint32_t signs, int8_t *codes) {
    const int8_t *point = qgraft_points + table + 8 * place;
    store_signed(point, point + 4, signs, codes);
}

ALWAYS_INLINE void store_fours(int table, uint32_t first, uint32_t second, uint32_t signs, int8_t *codes) {
    store_signed(qgraft_points + table + 4 * first, qgraft_points + table + 4 * second, signs, codes);
}

/* IQ1: 8 times a number of the table, and 1 more or less. */
ALWAYS_INLINE void store_shifted(uint32_t place, int minus, int8_t *codes) {
    const int8_t *point = qgraft_points + POINTS_IQ1 + 8 * place;
    for (int j = 0; j < 8; j++) codes[j] = (int8_t)(point[j] + (minus ? -1 : 1));
}

/* 2 bits of each of 32 bytes, less `zero`. */
ALWAYS_INLINE void two_bits(const uint8_t *q, int shift, int zero, int8_t *codes) {
    for (int j = 0; j < 32; j++) codes[j] = (int8_t)((q[j] >> shift & 3) - zero);
}

/* Digit `k` of n bytes, less 1. */
ALWAYS_INLINE void digits(const uint8_t *q, int n, int k, int8_t *codes) {
    static const uint8_t powers[5] = {1, 3, 9, 27, 81};
    for (int j = 0; j < n; j++) codes[j] = (int8_t)(((uint8_t)(q[j] * powers[k]) * 3 >> 8) - 1);
}

static void tq1_0_codes(const uint8_t *p, int k, int8_t *codes) {
    if (k < 5) {
        digits(p, 32, k, codes);
    } else {
        digits(p + 32, 16, 2 * (k - 5), codes);
        if (k < 7) digits(p + 32, 16, 2 * (k - 5) + 1, codes + 16);
        else
            for (int i = 0; i < 4; i++) digits(p + 48, 4, i, codes + 16 + 4 * i);
    }
}

/* Codes 32 k to 32 k + 31 of a block. */
static __attribute__((noinline, unused)) void chunk_codes(int format, const uint8_t *p, int k, int8_t codes[32]) {
    const uint8_t *fours = p + 2 + 8 * k, *eights = p + 2 + 4 * k;
    switch (format) {
        case Q2_K: two_bits(p + 16 + k / 4 * 32, k % 4 * 2, 0, codes); break;
        case Q3_K:
            two_bits(p + 32 + k / 4 * 32, k % 4 * 2, 4, codes);
            for (int j = 0; j < 32; j++) codes[j] = (int8_t)(codes[j] + (p[j] >> k & 1) * 4);
            break;
        case TQ1_0: tq1_0_codes(p, k, codes); break;
        case TQ2_0: two_bits(p + k / 4 * 32, k % 4 * 2, 1, codes); break;
        case IQ1_S: {
            const uint32_t high = u16_at(p + 34 + 2 * k);
            for (int l = 0; l < 4; l++)
                store_shifted(eights[l] | (high >> 3 * l & 7) << 8, high >> 15 & 1, codes + 8 * l);
            break;
        }
        case IQ1_M:
            for (int l = 0; l < 4; l++) {
                const uint32_t high = (uint32_t)p[32 + 2 * k + l / 2] >> l % 2 * 4;
                store_shifted(p[4 * k + l] | (high & 7) << 8, high >> 3 & 1, codes + 8 * l);
            }
            break;
        case IQ2_XXS: {
            const uint32_t signs = u32_at(fours + 4);
            for (int l = 0; l < 4; l++)
                store_eight(POINTS_IQ2_XXS, fours[l], even_signs(signs >> 7 * l & 127), codes + 8 * l);
            break;
        }
        case IQ2_XS:
            for (int l = 0; l < 4; l++) {
                const uint32_t word = u16_at(fours + 2 * l);
                store_eight(POINTS_IQ2_XS, word & 511, even_signs(word >> 9), codes + 8 * l);
            }
            break;
        case IQ2_S:
            for (int l = 0; l < 4; l++) {
                const uint32_t place = eights[l] | ((uint32_t)p[66 + k] >> 2 * l & 3) << 8;
                store_eight(POINTS_IQ2_S, place, p[34 + 4 * k + l], codes + 8 * l);
            }
            break;
        case IQ3_XXS: {
            const uint32_t signs = u32_at(p + 66 + 4 * k);
            for (int l = 0; l < 4; l++)
                store_fours(POINTS_IQ3_XXS, fours[2 * l], fours[2 * l + 1], even_signs(signs >> 7 * l & 127), codes + 8 * l);
            break;
        }
        case IQ3_S:
            for (int l = 0; l < 4; l++) {
                const uint32_t high = (uint32_t)p[66 + k] >> 2 * l;
                const uint32_t first = fours[2 * l] | (high & 1) << 8, second = fours[2 * l + 1] | (high >> 1 & 1) << 8;
                store_fours(POINTS_IQ3_S, first, second, p[74 + 4 * k + l], codes + 8 * l);
            }
            break;
    }
}

/* The integer scale of half h of chunk k. */
ALWAYS_INLINE int chunk_integer(const int format, const uint8_t *p, int k, int h) {
    const int s = 2 * k + h;
    switch (format) {
        case Q2_K: return p[s] & 15;
        case Q3_K: return ((p[96 + s % 8] >> s / 8 * 4 & 15) | (p[104 + s % 4] >> s / 4 * 2 & 3) << 4) - 32;
        case IQ1_S: return 2 * (int)(u16_at(p + 34 + 2 * k) >> 12 & 7) + 1;
        case IQ1_M: return 2 * (int)(u16_at(p + 48 + k / 2 * 2) >> (k % 2 * 6 + 3 * h) & 7) + 1;
        case IQ2_XXS: return 2 * (p[2 + 8 * k + 7] >> 4) + 1;
        case IQ2_XS: return 2 * (p[66 + k] >> 4 * h & 15) + 1;
        case IQ2_S: return 2 * (p[74 + k] >> 4 * h & 15) + 1;
        case IQ3_XXS: return 2 * (p[66 + 4 * k + 3] >> 4) + 1;
        case IQ3_S: return 2 * (p[106 + k / 2] >> k % 2 * 4 & 15) + 1;
        default: return 1; /* TQ1_0, TQ2_0 */
    }
}

/* What 1 is worth in the block; powers of two that belong to the integers are in it. */
ALWAYS_INLINE float chunk_unit(const int format, const uint8_t *p) {
    switch (format) {
        case Q2_K: return half_to_float(p + 80);
        case Q3_K: return half_to_float(p + 108);
        case TQ1_0: return half_to_float(p + 52);
        case TQ2_0: return half_to_float(p + 64);
        case IQ1_M: {
            const uint8_t half[2] = {(uint8_t)(p[49] >> 4 | (p[51] & 0xf0)), (uint8_t)(p[53] >> 4 | (p[55] & 0xf0))};
            return half_to_float(half) * 0.125f;
        }
        case IQ3_S: return half_to_float(p);
        case IQ3_XXS: return half_to_float(p) * 0.25f;
        default: return half_to_float(p) * 0.125f;
    }
}

/* The steps of the halves of chunk k at 2 k and 2 k + 1, and their minimums 16 further. */
static __attribute__((noinline, unused)) void chunk_scales(int format, const uint8_t *p, int k, float scales[K_SCALES]) {
    const float unit = chunk_unit(format, p);
    for (int h = 0; h < 2; h++) {
        scales[2 * k + h] = unit * (float)chunk_integer(format, p, k, h);
        scales[16 + 2 * k + h] = format == Q2_K ? -(half_to_float(p + 82) * (float)(p[2 * k + h] >> 4)) : 0.0f;
    }
}

#endif
