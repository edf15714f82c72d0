/* y = x W^T for one row of x, in float32, with VNNI: x in whole numbers of three digits, which codes are multiplied with in integers.
 *
 *     x = step * (a * 2^16 + b * 2^8 + c),  -128 <= a, b, c <= 127        step: a power of two for each group of 32 columns
 *     y = sum over groups:  d * step * (integer sum of q * x / step)  +  m * (sum of x)
 *
 * This is what gemm_int8.h sums, with three vpdpbusd instead of one for 64 products, where floats take four conversions and four
 * multiply-adds besides; places in codebooks are looked up as floats as fast. The largest |x| of a group is 2^21 to 2^22 steps
 * (2^20 to 2^21 for codes of 8 bits, or 32 bits would not hold four products): a number of x is off by at most 2^-22 (2^-21)
 * of it, about what rounding the sums of floats comes to. Numbers below 2^-100 in a whole group count as zero. x that is not
 * finite is left to the loops of floats.
 */

#ifndef QGRAFT_GEMV_DIGITS_H
#define QGRAFT_GEMV_DIGITS_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "gemm_int8.h"
#include "gemv.h"
#include "level.h"
#include "quantize_x.h"
#include "vec.h"

#if defined(__AVX512VNNI__)

enum { DIGITS = 3, DIGIT_COLUMNS = 4096 }; /* of x at a time: they stay in the first-level cache */

typedef struct {
    int8_t codes[DIGITS * DIGIT_COLUMNS];
    float steps[DIGIT_COLUMNS / 32], sums[DIGIT_COLUMNS / 32];
} DigitsOfX;

ALWAYS_INLINE float power_of_two(int exponent) {
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return power;
}

/* A group of 32 numbers, the largest of which has these bits; its digits are `stride` apart. */
ALWAYS_INLINE void digits_of_group(const int format, const float *x, uint32_t bits, int8_t *codes, int64_t stride, float *step,
                                   float *sum) {
    const int most = zero_code(format) == 128 ? 21 : 22, exponent = (int)(bits >> 23) - 127;
    const int nothing = exponent < -100;
    __m256i whole[4], digit[4];
    scale_to_integers(x, nothing ? 0.0f : power_of_two(most - 1 - exponent), whole);
    *step = nothing ? 0.0f : power_of_two(exponent + 1 - most);
    *sum = sum_of_eight(_mm256_add_ps(_mm256_add_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)),
                                      _mm256_add_ps(_mm256_loadu_ps(x + 16), _mm256_loadu_ps(x + 24))));
    for (int k = DIGITS - 1; k >= 0; k--) {
        for (int i = 0; i < 4; i++) {
            digit[i] = _mm256_srai_epi32(_mm256_slli_epi32(whole[i], 24), 24);
            whole[i] = _mm256_srai_epi32(_mm256_sub_epi32(whole[i], digit[i]), 8);
        }
        _mm256_storeu_si256((__m256i *)(codes + k * stride), placed(format, bytes_of_group(digit)));
    }
}

/* Whether all numbers are finite. */
ALWAYS_INLINE int digits_of_x(const int format, const float *x, int64_t columns, int64_t groups, DigitsOfX *to) {
    for (int64_t g = 0; g < groups; g++) {
        const int64_t left = columns - 32 * g;
        float rest[32] = {0};
        if (left < 32) memcpy(rest, x + 32 * g, (size_t)larger(left, 0) * sizeof(float));
        const float *values = left < 32 ? rest : x + 32 * g;
        const uint32_t bits = largest_bits(values);
        if (bits >= 0x7f800000) return 0;
        digits_of_group(format, values, bits, to->codes + 32 * g, 32 * groups, to->steps + g, to->sums + g);
    }
    return 1;
}

ALWAYS_INLINE int gemv_digits(const int format, const Product *p, const float *x) {
    DigitsOfX own;
    for (int64_t j = 0; j < p->columns; j += DIGIT_COLUMNS) {
        Product part = *p;
        part.columns = smaller(DIGIT_COLUMNS, p->columns - j), part.data += row_bytes(format, j);
        const QuantizedX digits = {own.codes, own.steps, own.sums, groups_of(part.columns)};
        if (!digits_of_x(format, x + j, part.columns, digits.groups, &own)) return 0;
        for (int64_t r = p->first; r < p->last; r += FEW_ROWS) int8_tile(format, FEW_ROWS, 1, DIGITS, &part, &digits, r, 0, j > 0);
    }
    return 1;
}

void qgraft_gemv_vnni(const Product *p, const float *x) {
    int done = 0;
#define DIGITS_OF(FORMAT) done = gemv_digits(FORMAT, p, x)
    if (p->m == 1 && !is_codebook(p->format)) FOR_CODES(p->format, DIGITS_OF)
#undef DIGITS_OF
    if (!done) gemv(p, x);
}

#endif

#endif
