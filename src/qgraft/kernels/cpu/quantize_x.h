/* x rounded to 8 bits, for gemm_int8.h: each group of 32 neighbouring columns of a token has a step of its own.
 *
 *     step = max |x| / 127,  code = round(x * (127 / max |x|)), ties to even,  sum = step * (sum of the group's codes)
 *
 * One step for a whole token was not chosen: a few columns of a language model's activations are a hundred times larger
 * than the others, which would be left with one or two bits. Groups are those of the weights' blocks, so a group of the
 * product is one sum of integers and one float multiplication. A group below 2^-100 counts as zero; one with a NaN or an
 * infinity gets step and sum NaN, so that the whole output of its token is NaN and no wrong number looks right.
 */

#ifndef QGRAFT_QUANTIZE_X_H
#define QGRAFT_QUANTIZE_X_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "level.h"
#include "vec.h"

/* The step of a group whose largest |x| has these bits, and what x is multiplied by. */
ALWAYS_INLINE float group_step(uint32_t bits, float *inverse) {
    float largest;
    memcpy(&largest, &bits, 4); /* as integers, NaN > infinity > numbers */
    const float nothing = largest - largest; /* NaN where a number is not finite */
    *inverse = largest < 0x1p-100f ? 0.0f : 127.0f / largest;
    return largest < 0x1p-100f ? 0.0f : largest / 127.0f + nothing;
}

/* Where the code of column j of a group stands: those of ROW_INT4 in the order in which gemm_int8.h takes its codes apart, odd ones,
 * then even ones. */
ALWAYS_INLINE int place_of(const int format, int j) { return format == ROW_INT4 ? (j % 2 ? j / 2 : 16 + j / 2) : j; }

#if defined(__AVX2__)

/* 32 integers as bytes, in their order. */
ALWAYS_INLINE __m256i bytes_of_group(const __m256i code[4]) {
    const __m256i low = _mm256_packs_epi32(code[0], code[1]), high = _mm256_packs_epi32(code[2], code[3]);
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), in_order);
}

/* In the order of `place_of`. */
ALWAYS_INLINE __m256i placed(const int format, __m256i bytes) {
    const __m256i odd_even = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14));
    return format == ROW_INT4 ? _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, odd_even), 0xd8) : bytes;
}

ALWAYS_INLINE void scale_to_integers(const float *x, float inverse, __m256i code[4]) {
    for (int i = 0; i < 4; i++)
        code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse)));
}

/* 32 numbers -> codes; their sum. */
ALWAYS_INLINE int round_group(const int format, const float *x, float inverse, int8_t *codes) {
    __m256i code[4];
    scale_to_integers(x, inverse, code);
    const __m256i bytes = bytes_of_group(code);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    _mm256_storeu_si256((__m256i *)codes, placed(format, bytes));
    return _mm_cvtsi128_si32(sum);
}

ALWAYS_INLINE uint32_t largest_bits(const float *x) {
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)(x + 8 * i));
        most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

#else

ALWAYS_INLINE int round_group(const int format, const float *x, float inverse, int8_t *codes) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    int sum = 0;
    for (int j = 0; j < 32; j++) {
        const int code = (int)((x[j] * inverse + magic) - magic);
        codes[place_of(format, j)] = (int8_t)code;
        sum += code;
    }
    return sum;
}

ALWAYS_INLINE uint32_t largest_bits(const float *x) {
    uint32_t largest = 0;
    for (int j = 0; j < 32; j++) {
        uint32_t bits;
        memcpy(&bits, x + j, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

#endif

ALWAYS_INLINE void quantize_group(const int format, const float *x, int8_t *codes, float *step, float *sum) {
    const uint32_t bits = largest_bits(x);
    float inverse;
    *step = group_step(bits, &inverse);
    if (bits < 0x7f800000) *sum = *step * (float)round_group(format, x, inverse, codes);
    else memset(codes, 0, 32), *sum = *step;
}

/* `columns` of a token, and zeros up to the end of its groups. */
ALWAYS_INLINE void quantize_groups(const int format, const float *x, int64_t columns, int64_t token, const QuantizedX *to) {
    for (int64_t g = 0; g < to->groups; g++) {
        const int64_t at = token * to->groups + g, left = columns - 32 * g;
        float rest[32] = {0};
        if (left <= 0) {
            memset(to->codes + 32 * at, 0, 32);
            to->steps[at] = to->sums[at] = 0.0f;
            continue;
        }
        if (left < 32) memcpy(rest, x + 32 * g, (size_t)left * sizeof(float));
        quantize_group(format, left < 32 ? rest : x + 32 * g, to->codes + 32 * at, to->steps + at, to->sums + at);
    }
}

static void quantize_x(int format, const float *x, int64_t columns, int64_t token, const QuantizedX *codes) {
    if (format == ROW_INT4) quantize_groups(ROW_INT4, x, columns, token, codes);
    else quantize_groups(Q8_0, x, columns, token, codes); /* as all others */
}

#endif
