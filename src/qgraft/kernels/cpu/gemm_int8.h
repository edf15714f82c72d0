/* y = x W^T in 8-bit integers: codes of W times codes of x (quantize_x.h), for AVX2 and AVX-512 VNNI. With AVX2 this is for few
 * tokens: gemm_int8_panels.h multiplies many.
 *
 *     y = sum over groups of 32:  d * step * (integer sum of (q - zero) * code)  +  m * sum
 *
 * with w = d * (q - zero) + m the weights of a group, or d of each half of it. The integer sums are exact: q is an unsigned byte,
 * and zero times the codes is taken off again in integers. AVX2 adds pairs of products in 16 bits (vpmaddubsw), which codes of 6
 * bits cannot fill; codes of 8 bits move their sign to x, and 2 * 128 * 127 just fits. A vector holds one group (AVX2) or two
 * (VNNI); an odd last group has a second one whose step and codes of x are 0.
 *
 * Scales of 256 columns are read at once, as for one row of x in float32 (gemv_codes.h), and multiplied with the steps there.
 *
 * Tiles of R rows of W and T rows of x are those of gemv.h.
 */

#ifndef QGRAFT_GEMM_INT8_H
#define QGRAFT_GEMM_INT8_H

#include <stdint.h>
#include <string.h>

#include "codes.h"
#include "common.h"
#include "formats.h"
#include "gemv_codes.h"
#include "level.h"
#include "vec.h"

#ifndef GEMM_INT8
#error "GEMM_INT8: the name of the function to define, of those that level.h declares"
#endif

/* What the unsigned codes are more than what they stand for. */
ALWAYS_INLINE int zero_code(const int format) {
    switch (format) {
        case Q4_0: case ROW_INT4: return 8;
        case Q5_0: return 16;
        case Q6_K: return 32;
        case MXFP4: case NVFP4: return 12;
        case Q8_0: case ROW_INT8: case IQ4_NL: case IQ4_XS: return 128;
        default: return 0;
    }
}

/* Codes 32 c to 32 c + 31 as unsigned bytes, those of ROW_INT4 in the order in which quantize_x.h has x. */
ALWAYS_INLINE __m256i unsigned_codes(const int format, const uint8_t *row, int64_t c) {
    if (format == ROW_INT4) return _mm256_xor_si256(nibble_bytes(row + 16 * c), _mm256_set1_epi8(8));
    return _mm256_add_epi8(codes32(format, row, c), _mm256_set1_epi8((char)zero_code(format)));
}

/* The scales of 256 columns of a row, or of their halves, times the steps of x there. */
typedef struct {
    float of[16];
} Scales;

ALWAYS_INLINE Scales scales_of(const int format, const float *d, const float *steps) {
    Scales scales;
    const __m256 step = _mm256_loadu_ps(steps);
    const __m256i low = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), high = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
    const __m256 first = has_half_scales(format) ? _mm256_permutevar8x32_ps(step, low) : step;
    _mm256_storeu_ps(scales.of, _mm256_mul_ps(_mm256_loadu_ps(d), first));
    if (has_half_scales(format))
        _mm256_storeu_ps(scales.of + 8, _mm256_mul_ps(_mm256_loadu_ps(d + 8), _mm256_permutevar8x32_ps(step, high)));
    return scales;
}

#if defined(__AVX512VNNI__)

/* Groups of a vector, tiles for one token and for more; bytes of 256 codes that are multiplied faster than they come. */
enum { GROUPS = 2, FEW_ROWS = 4, INT8_ROWS = 4, INT8_TOKENS = 4, FAST_BYTES = 208 };

/* To the lanes of chunks k and k + 1 their scales. */
ALWAYS_INLINE vfloat spread_scales(const int format, const Scales *scales, int k) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    if (has_half_scales(format)) return _mm512_permutexvar_ps(lane, _mm512_broadcast_f32x4(_mm_loadu_ps(scales->of + 2 * k)));
    const __m512 both = _mm512_castps256_ps512(_mm256_loadu_ps(scales->of));
    return _mm512_permutexvar_ps(_mm512_add_epi32(_mm512_srli_epi32(lane, 1), i_set(k)), both);
}

ALWAYS_INLINE vint two_groups(__m256i first, __m256i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

/* 16 bytes of nibbles of each group -> bytes, low nibbles first. */
ALWAYS_INLINE vint two_nibbles(const uint8_t *a, const uint8_t *b) {
    const vint both = two_groups(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)a)),
                                 _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)b)));
    return i_and(_mm512_srlv_epi64(both, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4)), i_set8(15));
}

/* 32 bytes, as they are and shifted by `shift`. */
ALWAYS_INLINE vint twice_shifted(const uint8_t *p, int first, int second) {
    const vint shift = _mm512_setr_epi64(first, first, first, first, second, second, second, second);
    return _mm512_srlv_epi64(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p)), shift);
}

/* The bits of `mask` of a, the others of b. */
ALWAYS_INLINE vint pick_bits(int mask, vint a, vint b) { return _mm512_ternarylogic_epi64(i_set8((char)mask), a, b, 0xca); }

/* Chunks k and k + 1 of the block at p, an even k; the first one twice where there is no second. */
ALWAYS_INLINE vint code_bytes(const int format, const uint8_t *p, int k, int second) {
    const vint fifth = i_set8(16), fours = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
    switch (format) {
        case Q4_0: case Q4_1: return two_nibbles(nibbles_of(format, p, k), nibbles_of(format, p, k + second));
        case ROW_INT4: return i_xor(two_nibbles(nibbles_of(format, p, k), nibbles_of(format, p, k + second)), i_set8(8));
        case Q4_K: return i_and(twice_shifted(nibbles_of(format, p, k), 0, 4), i_set8(15));
        case Q5_K: {
            const vint low = i_and(twice_shifted(p + 48 + k / 2 * 32, 0, 4), i_set8(15));
            const vint bit = two_groups(_mm256_set1_epi8((char)(1 << k)), _mm256_set1_epi8((char)(2 << k)));
            return _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(twice_shifted(p + 16, 0, 0), bit), low, fifth);
        }
        case Q6_K: {
            const vint both = i_load(p + k / 4 * 64), low = k % 4 ? _mm512_srli_epi16(both, 4) : both;
            const vint high = twice_shifted(p + 128 + k / 4 * 32, k % 4 * 2, k % 4 * 2 + 2);
            return i_and(pick_bits(15, low, _mm512_slli_epi16(high, 4)), i_set8(63));
        }
        case IQ4_NL: case MXFP4: case IQ4_XS: {
            const vint table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)levels_of(format)));
            const uint8_t *at = nibbles_of(format, p, k);
            vint places;
            if (format == IQ4_XS) {
                const vint bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at));
                places = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), bytes);
                places = i_and(_mm512_srlv_epi64(places, fours), i_set8(15));
            } else {
                places = two_nibbles(at, nibbles_of(format, p, k + second));
            }
            return _mm512_shuffle_epi8(_mm512_add_epi8(table, i_set8((char)zero_code(format))), places);
        }
        default: return two_groups(unsigned_codes(format, p, k), unsigned_codes(format, p, k + second));
    }
}

/* Sums of products with codes of x, or of whole numbers of `digits` bytes, the highest first; `start` is added. */
ALWAYS_INLINE vint dot_digits(const int digits, vint w, const vint *x, vint start) {
    vint sum = i_zero();
    for (int i = 0; i + 1 < digits; i++) sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, w, x[i]), 8);
    if (digits == 1) return _mm512_dpbusd_epi32(start, w, x[0]);
    return _mm512_add_epi32(sum, _mm512_dpbusd_epi32(start, w, x[digits - 1]));
}

/* What `zero` times the codes of x adds to each sum, negated: where the sums begin. */
ALWAYS_INLINE vint zero_products(int zero, const int digits, const vint *x) {
    return zero ? _mm512_sub_epi32(i_zero(), dot_digits(digits, i_set8((char)zero), x, i_zero())) : i_zero();
}

ALWAYS_INLINE vfloat dot_codes(int zero, const int digits, vint w, const vint *x, vint start) {
    (void)zero;
    return v_int(dot_digits(digits, w, x, start));
}

#else

enum { GROUPS = 1, FEW_ROWS = 4, INT8_ROWS = 2, INT8_TOKENS = 2, FAST_BYTES = 256 };

ALWAYS_INLINE vfloat spread_scales(const int format, const Scales *scales, int k) {
    if (!has_half_scales(format)) return v_set(scales->of[k]);
    return _mm256_blend_ps(v_set(scales->of[2 * k]), v_set(scales->of[2 * k + 1]), 0xf0);
}

/* Signed, where 16 bits would not hold products of unsigned ones. */
ALWAYS_INLINE vint code_bytes(const int format, const uint8_t *p, int k, int second) {
    (void)second;
    return zero_code(format) == 128 ? codes32(format, p, k) : unsigned_codes(format, p, k);
}

ALWAYS_INLINE vint zero_products(int zero, const int digits, const vint *x) {
    (void)digits;
    return _mm256_maddubs_epi16(i_set8((char)zero), x[0]);
}

/* Of one digit: there are no others with AVX2. */
ALWAYS_INLINE vfloat dot_codes(int zero, const int digits, vint w, const vint *x, vint start) {
    (void)digits;
    vint pairs;
    if (zero == 128) pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x[0], w));
    else pairs = _mm256_maddubs_epi16(w, x[0]);
    if (zero && zero != 128) pairs = _mm256_sub_epi16(pairs, start);
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#endif

/* The same of a row's last chunks, with `left` columns, fewer than a vector has: nothing beyond them is read. */
ALWAYS_INLINE vint last_code_bytes(const int format, const uint8_t *p, int k, int64_t left) {
    uint8_t rest[64] = {0};
    if (format != ROW_INT8 && format != ROW_INT4) return code_bytes(format, p, k, 0);
    memcpy(rest, p + row_bytes(format, 32 * k), (size_t)row_bytes(format, left));
    return code_bytes(format, rest, 0, 1);
}

/* `digits`: of each code of x; those of one row of x follow each other. `adds`: to what y is. */
ALWAYS_INLINE void int8_tile(const int format, const int R, const int T, const int digits, const Product *p,
                             const QuantizedX *x, int64_t r0, int64_t t0, int adds) {
    const int zero = zero_code(format);
    const int64_t bytes = row_bytes(format, 256), chunks = (p->columns + 31) / 32; /* bytes of 8 chunks */
    const uint8_t *row[4];
    int64_t group[4];
    float scale[4];
    vfloat sums[4][4];
    __m256 added[4][4];
    for (int r = 0; r < R; r++) {
        const int64_t at = smaller(r0 + r, p->last - 1);
        row[r] = p->data + at * p->stride;
        scale[r] = p->scales ? p->scales[at] : 1.0f;
        for (int t = 0; t < T; t++) sums[r][t] = v_zero(), added[r][t] = _mm256_setzero_ps();
    }
    for (int t = 0; t < T; t++) group[t] = smaller(t0 + t, p->m - 1) * x->groups;
    for (int64_t first = 0; first < chunks; first += 8) {
        const int count = (int)smaller(8, chunks - first);
        const int64_t columns = p->columns - 32 * first;
        Scales scales[4][4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            float d[K_SCALES];
            read_steps(format, row[r], first, count, scale[r], d);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int64_t at = group[t] + first;
                scales[r][t] = scales_of(format, d, x->steps + at);
                if (has_minimum(format))
                    added[r][t] = _mm256_fmadd_ps(_mm256_loadu_ps(d + 8), _mm256_loadu_ps(x->sums + at), added[r][t]);
            }
        }
#pragma GCC unroll 8
        for (int k = 0; k < 8; k += GROUPS) {
            const int64_t left = columns - 32 * k;
            if (k >= count) break;
            vint w[4];
            const uint8_t *at = row[0] + R * (first + k) * bytes / 8;
            if (T == 1 && bytes >= FAST_BYTES) prefetch_second(at, R * GROUPS * bytes / 8);
            else if (T == 1) prefetch(at, R * GROUPS * bytes / 8);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const uint8_t *block = row[r] + row_bytes(format, 32 * first);
                w[r] = left < 32 * GROUPS ? last_code_bytes(format, block, k, left) : code_bytes(format, block, k, 1);
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                vint codes[3];
                for (int i = 0; i < digits; i++) codes[i] = i_load(x->codes + 32 * (group[t] + i * x->groups + first + k));
                const vint start = zero_products(zero, digits, codes);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    sums[r][t] = v_fma(dot_codes(zero, digits, w[r], codes, start), spread_scales(format, &scales[r][t], k),
                                       sums[r][t]);
            }
        }
    }
    for (int r = 0; r < R && r0 + r < p->last; r++)
        for (int t = 0; t < T && t0 + t < p->m; t++) {
            float *y = p->y + (t0 + t) * p->rows + r0 + r;
            *y = (adds ? *y : 0.0f) + v_sum(sums[r][t]);
            if (has_minimum(format)) *y += sum_of_eight(added[r][t]);
        }
}

ALWAYS_INLINE void int8_rows(const int format, const Product *p, const QuantizedX *x) {
    enum { BLOCK = 32 }; /* tokens whose codes stay in the first-level cache while the rows pass */
    for (int64_t r = p->first; p->m == 1 && r < p->last; r += FEW_ROWS) int8_tile(format, FEW_ROWS, 1, 1, p, x, r, 0, 0);
    for (int64_t i = 0; p->m > 1 && i < p->m; i += BLOCK)
        for (int64_t r = p->first; r < p->last; r += INT8_ROWS)
            for (int64_t t = i; t < i + BLOCK && t < p->m; t += INT8_TOKENS)
                int8_tile(format, INT8_ROWS, INT8_TOKENS, 1, p, x, r, t, 0);
}

void GEMM_INT8(const Product *p, const QuantizedX *x) {
#define ROWS(FORMAT) int8_rows(FORMAT, p, x)
    FOR_CODES(p->format, ROWS)
#undef ROWS
}

#endif
