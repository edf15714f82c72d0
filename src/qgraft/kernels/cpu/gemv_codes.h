/* AVX2: y = x W^T for one row of x, as in decoding, in float32: codes are multiplied first and scaled after.
 *
 *     y = sum over groups of 32:  d * (sum of code * x)  +  m * (sum of x)
 *
 * That is one multiplication by d for 32 weights where gemv.h has 32, and none by m. Codes of 4 bits are not even shifted: a
 * mask leaves byte s of each 32 bits, which is 256^s times the code, and x is divided by that beforehand, which is exact. So x
 * is first put in the order in which masks take the codes apart:
 *
 *     byte 4 i + s of a group holds columns 4 i + s (low) and 16 + 4 i + s (high)  ->  vector s: those of i = 0, 1, 2, 3
 */

#ifndef QGRAFT_GEMV_CODES_H
#define QGRAFT_GEMV_CODES_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "level.h"
#include "vec.h"

#if defined(__AVX512BW__)

/* Looking 16 weights up takes AVX-512 no longer (unpack_vec.h). */
ALWAYS_INLINE int multiplies_codes(const Product *p) {
    (void)p;
    return 0;
}
static void gemv_codes(const Product *p, const float *x) { (void)p, (void)x; }

#elif defined(__AVX2__)

enum { CODE_ROWS = 4, CODE_COLUMNS = 4096 }; /* of x at a time: they stay in the first-level cache */

/* x in the order of the codes, and the sum of each group, or what it starts from. */
typedef struct {
    _Alignas(32) float x[CODE_COLUMNS], sums[CODE_COLUMNS / 32];
} OrderedX;

ALWAYS_INLINE int multiplies_codes(const Product *p) {
    return p->m == 1 && (p->format == Q4_0 || p->format == Q4_1 || p->format == Q8_0);
}

/* Columns 4 i + s of both halves of a group, over 256^s, to vector s; the sum of all 32. */
ALWAYS_INLINE float order_group(const float *x, float *to) {
    vfloat r[4];
    for (int i = 0; i < 4; i++) r[i] = _mm256_loadu2_m128(x + 16 + 4 * i, x + 4 * i);
    const vfloat a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
    const vfloat c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
    v_store(to, _mm256_shuffle_ps(a, c, 0x44));
    v_store(to + 8, v_mul(_mm256_shuffle_ps(a, c, 0xee), v_set(0x1p-8f)));
    v_store(to + 16, v_mul(_mm256_shuffle_ps(b, d, 0x44), v_set(0x1p-16f)));
    v_store(to + 24, v_mul(_mm256_shuffle_ps(b, d, 0xee), v_set(0x1p-24f)));
    return v_sum(_mm256_add_ps(_mm256_add_ps(r[0], r[1]), _mm256_add_ps(r[2], r[3])));
}

static void order_x(int format, const float *x, int64_t columns, OrderedX *to) {
    for (int64_t g = 0; g < columns / 32; g++) {
        const float sum = order_group(x + 32 * g, to->x + 32 * g);
        to->sums[g] = format == Q4_0 ? -8.0f * sum : sum; /* 8 is the code of 0 */
    }
}

/* The sum of code * x in a group, 8 parts of it. `start`: what the first is added to. */
ALWAYS_INLINE vfloat nibbles_times_x(const uint8_t *q, const vfloat *x, vfloat start) {
    const vint both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)q));
    const vint codes = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    vfloat sum = v_fma(v_int(i_and(codes, i_set(0x0f))), x[0], start);
    sum = v_fma(v_int(i_and(codes, i_set(0x0f00))), x[1], sum);
    sum = v_fma(v_int(i_and(codes, i_set(0x0f0000))), x[2], sum);
    return v_fma(v_int(i_and(codes, i_set(0x0f000000))), x[3], sum);
}

ALWAYS_INLINE vfloat bytes_times_x(const uint8_t *q, const vfloat *x) {
    vfloat sum = v_mul(v_int(i_s8(q)), x[0]);
    for (int i = 1; i < 4; i++) sum = v_fma(v_int(i_s8(q + 8 * i)), x[i], sum);
    return sum;
}

/* The first halves of 4 blocks, or their first two, as floats: what a row has in lane r, or in lanes 2 r and 2 r + 1. */
ALWAYS_INLINE vfloat scales_of_blocks(const int has_m, const uint8_t *const *p) {
    int32_t h[CODE_ROWS];
    for (int r = 0; r < CODE_ROWS; r++) {
        int16_t half;
        if (has_m) memcpy(h + r, p[r], 4);
        else memcpy(&half, p[r], 2), h[r] = half;
    }
    const __m128i halves = _mm_setr_epi32(h[0], h[1], h[2], h[3]);
    if (has_m) return _mm256_cvtph_ps(halves);
    const __m128i low = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
    return _mm256_cvtph_ps(_mm_shuffle_epi8(halves, low));
}

/* Rows r0 to r0 + 3, columns 32 g0 on, `groups` groups; added to y but where `g0` is the first. */
ALWAYS_INLINE void gemv_codes_tile(const int format, const Product *p, const float *x, const float *group_sums, int64_t r0,
                                   int64_t g0, int64_t groups) {
    const int has_m = format == Q4_1, at = has_m ? 4 : 2;
    const int64_t bytes = row_bytes(format, 32);
    const uint8_t *row[CODE_ROWS];
    vfloat sums[CODE_ROWS], minimums = v_zero();
    for (int r = 0; r < CODE_ROWS; r++) {
        row[r] = p->data + smaller(r0 + r, p->last - 1) * p->stride + g0 * bytes;
        sums[r] = v_zero();
    }
    for (int64_t g = 0; g < groups; g++) {
        _Alignas(32) float scales[8];
        vfloat xs[4];
        prefetch(row[0] + g * CODE_ROWS * bytes, CODE_ROWS * bytes);
        for (int i = 0; i < 4; i++) xs[i] = v_load(x + 32 * g + 8 * i);
        const uint8_t *block[CODE_ROWS] = {row[0] + g * bytes, row[1] + g * bytes, row[2] + g * bytes, row[3] + g * bytes};
        const vfloat halves = scales_of_blocks(has_m, block);
        v_store(scales, halves);
        if (has_m) minimums = v_fma(halves, v_set(group_sums[g]), minimums);
        const vfloat start = format == Q4_0 ? _mm256_zextps128_ps256(_mm_load_ss(group_sums + g)) : v_zero();
#pragma GCC unroll 4
        for (int r = 0; r < CODE_ROWS; r++) {
            const uint8_t *q = block[r] + at;
            const vfloat sum = format == Q8_0 ? bytes_times_x(q, xs) : nibbles_times_x(q, xs, start);
            sums[r] = v_fma(v_set(scales[has_m ? 2 * r : r]), sum, sums[r]);
        }
    }
    float totals[4], added[8];
    _mm_storeu_ps(totals, v_sum4(sums[0], sums[1], sums[2], sums[3]));
    v_store(added, minimums);
    for (int r = 0; r < CODE_ROWS && r0 + r < p->last; r++) {
        const float total = has_m ? totals[r] + added[2 * r + 1] : totals[r];
        p->y[r0 + r] = g0 ? p->y[r0 + r] + total : total;
    }
}

/* Where multiplies_codes says so. */
static void gemv_codes(const Product *p, const float *x) {
    OrderedX ordered;
    for (int64_t j = 0; j < p->columns; j += CODE_COLUMNS) {
        const int64_t columns = smaller(CODE_COLUMNS, p->columns - j), g = j / 32, groups = columns / 32;
        if (p->format != Q8_0) order_x(p->format, x + j, columns, &ordered);
        for (int64_t r = p->first; r < p->last; r += CODE_ROWS) switch (p->format) {
                case Q4_0: gemv_codes_tile(Q4_0, p, ordered.x, ordered.sums, r, g, groups); break;
                case Q4_1: gemv_codes_tile(Q4_1, p, ordered.x, ordered.sums, r, g, groups); break;
                case Q8_0: gemv_codes_tile(Q8_0, p, x + j, NULL, r, g, groups); break;
            }
    }
}

#endif

#endif
