/* y = x W^T for one row of x, as in decoding, in float32: codes are multiplied first and scaled after.
 *
 *     y = sum over chunks of 32 columns:  d * (sum of code * x)  +  m * (sum of x)
 *
 * That is one multiplication by d for 32 weights (or 16, where halves of a chunk have scales of their own) where gemv.h has 32,
 * and one by m for 256. Codes of 4 bits have ways of their own (gemv_nibbles.h); others become bytes (codes.h), which are
 * extended from memory, 8 or 16 at a time.
 */

#ifndef QGRAFT_GEMV_CODES_H
#define QGRAFT_GEMV_CODES_H

#include <stdint.h>
#include <string.h>

#include "codes.h"
#include "common.h"
#include "formats.h"
#include "gemv_nibbles.h"
#include "level.h"
#include "unpack.h"
#include "unpack_vec.h"
#include "vec.h"

enum { CODE_ROWS = 4, CODE_COLUMNS = 4096 }; /* of x at a time: they stay in the first-level cache */

/* x in the order of the codes, where they have one, and the sum of each chunk. */
typedef struct {
    _Alignas(32) float x[CODE_COLUMNS], sums[CODE_COLUMNS / 32];
} OrderedX;

ALWAYS_INLINE int multiplies_codes(const Product *p) { return p->m == 1 && has_codes(p->format); }

/* Whether the sum of x in a chunk counts. */
ALWAYS_INLINE int adds_minimum(int format) { return has_minimum(format) || zero_of(format); }

static void order_x(int format, const float *x, int64_t columns, OrderedX *to) {
    int64_t c = 0;
    for (; c < columns / 32; c++, x += 32) {
        vfloat sum = v_load(x);
        for (int i = 1; i < PARTS; i++) sum = v_add(sum, v_load(x + LANES * i));
        to->sums[c] = v_sum(sum);
        if (has_order(format)) order_chunk(format, x, to->x + 32 * c);
    }
    for (; c % 8; c++) to->sums[c] = 0.0f;
}

/* The sum of code * x in each half of a chunk, LANES parts of it. */
ALWAYS_INLINE void bytes_times_x(const int format, const uint8_t *row, int64_t c, const vfloat *x, vfloat *half) {
    uint8_t bytes[32];
    const uint8_t *q = row + row_bytes(format, 32 * c) + (format == Q8_0 ? 2 : 0);
    if (format != Q8_0 && format != ROW_INT8) {
        _mm256_storeu_si256((__m256i *)bytes, codes32(format, row, c));
        q = bytes;
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++, q += 16, x += PARTS / 2) {
        half[h] = v_mul(v_int(i_s8(q)), x[0]);
        if (PARTS == 4) half[h] = v_fma(v_int(i_s8(q + 8)), x[1], half[h]);
    }
}

ALWAYS_INLINE int32_t word_of(const uint8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return word;
}

/* The first 4 bytes of `count` blocks, zeros behind those; they go through registers, which memory would hold up. */
ALWAYS_INLINE __m256i first_words(const uint8_t *p, int64_t bytes, int count) {
    if (count < 8) {
        int32_t words[8] = {0};
        for (int k = 0; k < count; k++) memcpy(words + k, p + k * bytes, 4);
        return _mm256_loadu_si256((const __m256i *)words);
    }
    __m128i low = _mm_cvtsi32_si128(word_of(p)), high = _mm_cvtsi32_si128(word_of(p + 4 * bytes));
    low = _mm_insert_epi32(low, word_of(p + bytes), 1), high = _mm_insert_epi32(high, word_of(p + 5 * bytes), 1);
    low = _mm_insert_epi32(low, word_of(p + 2 * bytes), 2), high = _mm_insert_epi32(high, word_of(p + 6 * bytes), 2);
    low = _mm_insert_epi32(low, word_of(p + 3 * bytes), 3), high = _mm_insert_epi32(high, word_of(p + 7 * bytes), 3);
    return _mm256_set_m128i(high, low);
}

/* iq4_xs: the 8 scales of 6 bits, less 32: 16 bits of their high two behind d, then their nibbles. */
ALWAYS_INLINE __m256i xs_scales(const uint8_t *p) {
    uint32_t low;
    memcpy(&low, p + 4, 4);
    const __m256i fours = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), twos = _mm256_srli_epi32(fours, 1);
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32((int)low), fours);
    const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(p[2] | p[3] << 8), twos);
    const __m256i both = _mm256_or_si256(_mm256_and_si256(nibbles, _mm256_set1_epi32(15)),
                                         _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4));
    return _mm256_sub_epi32(both, _mm256_set1_epi32(32));
}

/* As e8m0_to_float. */
ALWAYS_INLINE __m256 powers_of_two(__m256i e) {
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(subnormal, normal, _mm256_cmpgt_epi32(e, _mm256_set1_epi32(1))));
}

/* By what the sums of the `count` chunks from c on are multiplied, all of the same 256 columns: of the k-th steps[k], or
 * steps[2 k] and steps[2 k + 1] of its halves; what that of x is multiplied by is steps[8 + k]. `scale`: that of the row. */
ALWAYS_INLINE void read_steps(const int format, const uint8_t *row, int64_t c, int count, float scale, float steps[K_SCALES]) {
    const uint8_t *p = row + row_bytes(format, 32 * c);
    __m256 d = _mm256_set1_ps(scale), m = _mm256_setzero_ps();
    if (is_k_quant(format)) {
        read_k_scales(format, p, 0, 8, steps);
        return;
    }
    if (format == NVFP4) {
        for (int k = 0; k < count; k++) codebook_chunk(format, row, c + k, steps + 2 * k);
        return;
    }
    if (format == IQ4_XS) {
        d = _mm256_set1_ps(_cvtsh_ss((uint16_t)(p[0] | p[1] << 8)));
        d = _mm256_mul_ps(d, _mm256_cvtepi32_ps(xs_scales(p)));
    } else if (format == MXFP4) {
        d = powers_of_two(_mm256_and_si256(first_words(p, 17, count), _mm256_set1_epi32(0xff)));
    } else if (format != ROW_INT8 && format != ROW_INT4) {
        const __m256i pairs = first_words(p, row_bytes(format, 32), count), low = _mm256_set1_epi32(0xffff);
        const __m256i apart = _mm256_packus_epi32(_mm256_and_si256(pairs, low), _mm256_srli_epi32(pairs, 16));
        const __m256i halves = _mm256_permute4x64_epi64(apart, 0xd8);
        d = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
        if (has_minimum(format)) m = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    }
    if (zero_of(format)) m = _mm256_mul_ps(d, _mm256_set1_ps((float)zero_of(format)));
    _mm256_storeu_ps(steps, d);
    _mm256_storeu_ps(steps + 8, m);
}

/* Rows r0 to r0 + 3, chunks c0 on, `chunks` of them; added to y but where c0 is the first. */
ALWAYS_INLINE void gemv_codes_tile(const int format, const Product *p, const float *x, const float *sums_of_x, int64_t r0,
                                   int64_t c0, int64_t chunks) {
    const int64_t bytes = row_bytes(format, 256); /* of 8 chunks */
    const vfloat numbers = numbers_of(format);
    const uint8_t *row[CODE_ROWS];
    float scale[CODE_ROWS];
    vfloat sums[CODE_ROWS];
    __m256 added[CODE_ROWS];
    for (int r = 0; r < CODE_ROWS; r++) {
        const int64_t at = smaller(r0 + r, p->last - 1);
        row[r] = p->data + at * p->stride;
        scale[r] = p->scales ? p->scales[at] : 1.0f;
        sums[r] = v_zero(), added[r] = _mm256_setzero_ps();
    }
    for (int64_t first = 0; first < chunks; first += 8) {
        const int count = (int)smaller(8, chunks - first);
        float steps[CODE_ROWS][K_SCALES];
#pragma GCC unroll 4
        for (int r = 0; r < CODE_ROWS; r++) {
            read_steps(format, row[r], c0 + first, count, scale[r], steps[r]);
            if (adds_minimum(format))
                added[r] = _mm256_fmadd_ps(_mm256_loadu_ps(steps[r] + 8), _mm256_loadu_ps(sums_of_x + first), added[r]);
        }
#pragma GCC unroll 2
        for (int k = 0; k < count; k++) {
            const int64_t c = c0 + first + k;
            prefetch(row[0] + c * CODE_ROWS * bytes / 8, CODE_ROWS * bytes / 8);
            vfloat xs[PARTS], half[2];
            for (int i = 0; i < PARTS; i++) xs[i] = v_load(x + 32 * (first + k) + LANES * i);
#pragma GCC unroll 4
            for (int r = 0; r < CODE_ROWS; r++) {
                if (has_nibbles(format)) {
                    sums[r] = v_fma(v_set(steps[r][k]), nibbles_times_x(format, row[r], c, numbers, xs), sums[r]);
                    continue;
                }
                bytes_times_x(format, row[r], c, xs, half);
                if (has_half_scales(format)) {
                    sums[r] = v_fma(v_set(steps[r][2 * k]), half[0], sums[r]);
                    sums[r] = v_fma(v_set(steps[r][2 * k + 1]), half[1], sums[r]);
                } else {
                    sums[r] = v_fma(v_set(steps[r][k]), v_add(half[0], half[1]), sums[r]);
                }
            }
        }
    }
    float totals[CODE_ROWS], minimums[CODE_ROWS];
    _mm_storeu_ps(totals, v_sum4(sums[0], sums[1], sums[2], sums[3]));
    _mm_storeu_ps(minimums, sum4_of_eight(added[0], added[1], added[2], added[3]));
    for (int r = 0; r < CODE_ROWS && r0 + r < p->last; r++)
        p->y[r0 + r] = (c0 ? p->y[r0 + r] : 0.0f) + totals[r] + minimums[r];
}

/* All whole chunks, where multiplies_codes says so. */
static void gemv_codes(const Product *p, const float *x) {
    OrderedX own;
    const int ordered = has_order(p->format);
    for (int64_t j = 0; j < p->columns / 32 * 32; j += CODE_COLUMNS) {
        const int64_t columns = smaller(CODE_COLUMNS, p->columns - j);
        if (ordered || adds_minimum(p->format)) order_x(p->format, x + j, columns, &own);
#define TILE(FORMAT) gemv_codes_tile(FORMAT, p, ordered ? own.x : x + j, own.sums, r, j / 32, columns / 32)
        for (int64_t r = p->first; r < p->last; r += CODE_ROWS) FOR_CODES(p->format, TILE)
#undef TILE
    }
    if (p->columns < 32)
        for (int64_t r = p->first; r < p->last; r++) p->y[r] = 0.0f;
}

#endif
