/* y = x W^T in 8-bit integers: codes of W times codes of x (quantize_x.h), for AVX2 and AVX-512 VNNI. With AVX2 this is for few
 * tokens: gemm_int8_panels.h multiplies many.
 *
 *     y = sum over groups of 32:  d * step * (integer sum of (q - zero) * code)  +  m * sum
 *
 * with w = d * (q - zero) + m the weights of a group. The integer sums are exact: q is an unsigned byte, and zero times
 * the codes is taken off again in integers. AVX2 adds pairs of products in 16 bits (vpmaddubsw), which codes of 4 bits
 * cannot fill; codes of 8 bits move their sign to x, and 2 * 128 * 127 just fits. A vector holds one group (AVX2) or two
 * (VNNI); an odd last group has a second one whose step, sum and codes of x are 0.
 *
 * Tiles of R rows of W and T rows of x are those of gemv.h.
 */

#ifndef QGRAFT_GEMM_INT8_H
#define QGRAFT_GEMM_INT8_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "level.h"
#include "vec.h"

#ifndef GEMM_INT8
#error "GEMM_INT8: the name of the function to define, of those that level.h declares"
#endif

#if defined(__AVX512VNNI__)

enum { GROUPS = 2, INT8_ROWS = 4, INT8_TOKENS = 4 };

/* (a, b) -> a in the lanes of the first group, b in those of the second. */
ALWAYS_INLINE vfloat spread_groups(const float *values) {
    const __m128 pair = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)values));
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(pair));
}

/* Only in the first lane of each group: for what is added once. */
ALWAYS_INLINE vfloat first_lanes(vfloat v) { return _mm512_maskz_mov_ps(0x0101, v); }

/* 16 bytes of nibbles of each group -> bytes, low nibbles first. */
ALWAYS_INLINE vint load_nibbles(const uint8_t *a, const uint8_t *b) {
    const __m256i first = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)a));
    const __m256i second = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)b));
    const vint both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    const vint shift = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
    return i_and(_mm512_srlv_epi64(both, shift), i_set8(15));
}

ALWAYS_INLINE vint load_bytes(const uint8_t *a, const uint8_t *b) {
    const __m256i first = _mm256_loadu_si256((const __m256i *)a), second = _mm256_loadu_si256((const __m256i *)b);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

/* What `zero` times the codes of x adds to each sum, negated: where the sums begin. */
ALWAYS_INLINE vint zero_products(int zero, vint x) {
    return _mm512_sub_epi32(i_zero(), _mm512_dpbusd_epi32(i_zero(), i_set8((char)zero), x));
}

ALWAYS_INLINE vfloat dot_codes(int zero, vint w, vint x, vint start) {
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(zero ? start : i_zero(), w, x));
}

#else

enum { GROUPS = 1, INT8_ROWS = 2, INT8_TOKENS = 2 };

ALWAYS_INLINE vfloat spread_groups(const float *values) { return v_set(*values); }
ALWAYS_INLINE vfloat first_lanes(vfloat v) { return _mm256_blend_ps(v_zero(), v, 1); }

ALWAYS_INLINE vint load_nibbles(const uint8_t *a, const uint8_t *b) {
    (void)b;
    const vint both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)a));
    return i_and(_mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4)), i_set8(15));
}

ALWAYS_INLINE vint load_bytes(const uint8_t *a, const uint8_t *b) {
    (void)b;
    return i_load(a);
}

ALWAYS_INLINE vint zero_products(int zero, vint x) { return _mm256_maddubs_epi16(i_set8((char)zero), x); }

/* zero = 128: the bytes are signed codes + 128, which 16 bits would not hold. */
ALWAYS_INLINE vfloat dot_codes(int zero, vint w, vint x, vint start) {
    vint pairs;
    if (zero == 128) {
        const vint code = i_xor(w, i_set8((char)128));
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(x, code));
    } else {
        pairs = _mm256_maddubs_epi16(w, x);
        if (zero) pairs = _mm256_sub_epi16(pairs, start);
    }
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#endif

/* GROUPS groups of one row: unsigned codes q, d and m of w = d * (q - zero) + m. */
typedef struct {
    vint q;
    vfloat d, m;
} Codes;

ALWAYS_INLINE int zero_code(const int format) { return format == Q4_1 ? 0 : format == Q4_0 || format == ROW_INT4 ? 8 : 128; }

ALWAYS_INLINE vfloat load_halves(const uint8_t *a, const uint8_t *b) {
    uint16_t halves[2];
    memcpy(halves, a, 2), memcpy(halves + 1, b, 2);
    const uint32_t both = halves[0] | (uint32_t)halves[1] << 16; /* as an int the second would shift into the sign */
    const __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128((int)both));
    float values[4];
    _mm_storeu_ps(values, pair);
    return spread_groups(values);
}

/* `left`: columns from here to the end of the row. Bytes beyond it are never read. */
ALWAYS_INLINE Codes read_codes(const int format, const uint8_t *p, int64_t left, float scale) {
    const int64_t bytes = row_bytes(format, 32);
    const uint8_t *a = p, *b = left > 32 ? p + bytes : p;
    uint8_t rest[64];
    if ((format == ROW_INT8 || format == ROW_INT4) && left < 32 * GROUPS && left % 32) {
        memset(rest, 0, sizeof rest);
        memcpy(rest, p, (size_t)row_bytes(format, left));
        a = rest, b = rest + bytes;
    }
    switch (format) {
        case Q4_0: return (Codes){load_nibbles(a + 2, b + 2), load_halves(a, b), v_zero()};
        case Q4_1: return (Codes){load_nibbles(a + 4, b + 4), load_halves(a, b), first_lanes(load_halves(a + 2, b + 2))};
        case Q8_0: return (Codes){i_xor(load_bytes(a + 2, b + 2), i_set8((char)128)), load_halves(a, b), v_zero()};
        case ROW_INT8: return (Codes){i_xor(load_bytes(a, b), i_set8((char)128)), v_set(scale), v_zero()};
        default: return (Codes){i_xor(load_nibbles(a, b), i_set8(8)), v_set(scale), v_zero()};
    }
}

ALWAYS_INLINE void int8_tile(const int format, const int R, const int T, const Product *p, const QuantizedX *x,
                             int64_t r0, int64_t t0) {
    const int zero = zero_code(format);
    vfloat sums[4][4];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sums[r][t] = v_zero();
    for (int64_t g = 0; 32 * g < p->columns; g += GROUPS) {
        Codes w[4];
        const int64_t bytes = R * row_bytes(format, 32); /* of a group */
        if (T == 1) prefetch(p->data + r0 * p->stride + g * bytes, GROUPS * bytes);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const int64_t at = r0 + r < p->last ? r0 + r : p->last - 1;
            const uint8_t *row = p->data + at * p->stride + g * row_bytes(format, 32);
            if (T == 1) _mm_prefetch((const char *)row + PREFETCH_DISTANCE, _MM_HINT_T0);
            w[r] = read_codes(format, row, p->columns - 32 * g, p->scales ? p->scales[at] : 1.0f);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const int64_t at = (t0 + t < p->m ? t0 + t : p->m - 1) * x->groups + g;
            const vint codes = i_load(x->codes + 32 * at), start = zero_products(zero, codes);
            const vfloat step = spread_groups(x->steps + at);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                sums[r][t] = v_fma(dot_codes(zero, w[r].q, codes, start), v_mul(w[r].d, step), sums[r][t]);
                if (format == Q4_1) sums[r][t] = v_fma(w[r].m, spread_groups(x->sums + at), sums[r][t]);
            }
        }
    }
    for (int r = 0; r < R && r0 + r < p->last; r++)
        for (int t = 0; t < T && t0 + t < p->m; t++) p->y[(t0 + t) * p->rows + r0 + r] = v_sum(sums[r][t]);
}

ALWAYS_INLINE void int8_rows(const int format, const Product *p, const QuantizedX *x) {
    enum { BLOCK = 32 }; /* tokens whose codes stay in the first-level cache while the rows pass */
    for (int64_t i = 0; i < p->m; i += BLOCK)
        for (int64_t r = p->first; r < p->last; r += INT8_ROWS)
            for (int64_t t = i; t < i + BLOCK && t < p->m; t += INT8_TOKENS) {
                if (t + 1 == p->m) int8_tile(format, INT8_ROWS, 1, p, x, r, t);
                else int8_tile(format, INT8_ROWS, INT8_TOKENS, p, x, r, t);
            }
}

void GEMM_INT8(const Product *p, const QuantizedX *x) {
    switch (p->format) {
        case Q4_0: int8_rows(Q4_0, p, x); break;
        case Q4_1: int8_rows(Q4_1, p, x); break;
        case Q8_0: int8_rows(Q8_0, p, x); break;
        case ROW_INT8: int8_rows(ROW_INT8, p, x); break;
        case ROW_INT4: int8_rows(ROW_INT4, p, x); break;
    }
}

#endif
