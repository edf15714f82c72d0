/* y = x W^T in 8-bit integers: codes of W times codes of x (activations.h), for AVX2 and AVX-512 VNNI.
 *
 *     y = sum over groups of 32:  d * step * (integer sum of (q - zero) * code)  +  m * sum
 *
 * with w = d * (q - zero) + m the weights of a group. The integer sums are exact: q is an unsigned byte, and zero times
 * the codes is taken off again in integers. AVX2 adds pairs of products in 16 bits (vpmaddubsw), which codes of 4 bits
 * cannot fill; codes of 8 bits move their sign to x, and 2 * 128 * 127 just fits. A vector holds one group (AVX2) or two
 * (VNNI); an odd last group has a second one whose step, sum and codes of x are 0.
 *
 * Tiles of R rows of W and T rows of x are those of small.h.
 */

#include <immintrin.h>

#include "activations.h"

#if defined(__AVX512VNNI__)

typedef __m512i B; /* bytes of W or x, or their sums in 32 bits */
typedef __m512 F;
enum { GROUPS = 2, INT8_ROWS = 4, INT8_TOKENS = 4 };
#define b_load(p) _mm512_loadu_si512(p)
#define b_set8 _mm512_set1_epi8
#define b_xor _mm512_xor_si512
#define f_zero _mm512_setzero_ps
#define f_set _mm512_set1_ps
#define f_mul _mm512_mul_ps
#define f_fma _mm512_fmadd_ps
#define f_total _mm512_reduce_add_ps

/* (a, b) -> a in the lanes of the first group, b in those of the second. */
ALWAYS_INLINE F f_groups(const float *values) {
    const __m128 pair = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)values));
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(pair));
}

/* Only in the first lane of each group: for what is added once. */
ALWAYS_INLINE F f_once(F v) { return _mm512_maskz_mov_ps(0x0101, v); }

/* 16 bytes of nibbles of each group -> bytes, low nibbles first. */
ALWAYS_INLINE B b_nibbles(const uint8_t *a, const uint8_t *b) {
    const __m256i first = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)a));
    const __m256i second = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)b));
    const B both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    const B shift = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
    return _mm512_and_si512(_mm512_srlv_epi64(both, shift), b_set8(15));
}

ALWAYS_INLINE B b_bytes(const uint8_t *a, const uint8_t *b) {
    const __m256i first = _mm256_loadu_si256((const __m256i *)a), second = _mm256_loadu_si256((const __m256i *)b);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

/* What `zero` times the codes of x adds to each sum, negated: where the sums begin. */
ALWAYS_INLINE B b_start(int zero, B x) {
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_dpbusd_epi32(_mm512_setzero_si512(), b_set8((char)zero), x));
}

ALWAYS_INLINE F f_dot(int zero, B w, B x, B start) {
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(zero ? start : _mm512_setzero_si512(), w, x));
}

#else

typedef __m256i B;
typedef __m256 F;
enum { GROUPS = 1, INT8_ROWS = 2, INT8_TOKENS = 2 };
#define b_load(p) _mm256_loadu_si256((const __m256i *)(p))
#define b_set8 _mm256_set1_epi8
#define b_xor _mm256_xor_si256
#define f_zero _mm256_setzero_ps
#define f_set _mm256_set1_ps
#define f_mul _mm256_mul_ps
#define f_fma _mm256_fmadd_ps

ALWAYS_INLINE F f_groups(const float *values) { return f_set(*values); }
ALWAYS_INLINE F f_once(F v) { return _mm256_blend_ps(f_zero(), v, 1); }

ALWAYS_INLINE float f_total(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

ALWAYS_INLINE B b_nibbles(const uint8_t *a, const uint8_t *b) {
    (void)b;
    const B both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)a));
    return _mm256_and_si256(_mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4)), b_set8(15));
}

ALWAYS_INLINE B b_bytes(const uint8_t *a, const uint8_t *b) {
    (void)b;
    return b_load(a);
}

ALWAYS_INLINE B b_start(int zero, B x) { return _mm256_maddubs_epi16(b_set8((char)zero), x); }

/* zero = 128: the bytes are signed codes + 128, which 16 bits would not hold. */
ALWAYS_INLINE F f_dot(int zero, B w, B x, B start) {
    B pairs;
    if (zero == 128) {
        const B code = b_xor(w, b_set8((char)128));
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
    B q;
    F d, m;
} Codes;

ALWAYS_INLINE int zero_code(const int format) { return format == Q4_1 ? 0 : format == Q4_0 || format == ROW_INT4 ? 8 : 128; }

ALWAYS_INLINE F block_half(const uint8_t *a, const uint8_t *b) {
    uint16_t halves[2];
    memcpy(halves, a, 2), memcpy(halves + 1, b, 2);
    const uint32_t both = halves[0] | (uint32_t)halves[1] << 16; /* as an int the second would shift into the sign */
    const __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128((int)both));
    float values[4];
    _mm_storeu_ps(values, pair);
    return f_groups(values);
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
        case Q4_0: return (Codes){b_nibbles(a + 2, b + 2), block_half(a, b), f_zero()};
        case Q4_1: return (Codes){b_nibbles(a + 4, b + 4), block_half(a, b), f_once(block_half(a + 2, b + 2))};
        case Q8_0: return (Codes){b_xor(b_bytes(a + 2, b + 2), b_set8((char)128)), block_half(a, b), f_zero()};
        case ROW_INT8: return (Codes){b_xor(b_bytes(a, b), b_set8((char)128)), f_set(scale), f_zero()};
        default: return (Codes){b_xor(b_nibbles(a, b), b_set8(8)), f_set(scale), f_zero()};
    }
}

ALWAYS_INLINE void int8_tile(const int format, const int R, const int T, const Product *of, const Activations *x,
                             int64_t r0, int64_t t0) {
    const int zero = zero_code(format);
    F sums[4][4];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sums[r][t] = f_zero();
    for (int64_t g = 0; 32 * g < of->columns; g += GROUPS) {
        Codes w[4];
        const int64_t bytes = R * row_bytes(format, 32); /* of a group */
        if (T == 1) fetch_ahead(of->data + r0 * of->stride + g * bytes, GROUPS * bytes);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const int64_t at = r0 + r < of->last ? r0 + r : of->last - 1;
            const uint8_t *row = of->data + at * of->stride + g * row_bytes(format, 32);
            if (T == 1) _mm_prefetch((const char *)row + AHEAD, _MM_HINT_T0);
            w[r] = read_codes(format, row, of->columns - 32 * g, of->scales ? of->scales[at] : 1.0f);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const int64_t at = (t0 + t < of->m ? t0 + t : of->m - 1) * x->groups + g;
            const B codes = b_load(x->codes + 32 * at), start = b_start(zero, codes);
            const F step = f_groups(x->steps + at);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                sums[r][t] = f_fma(f_dot(zero, w[r].q, codes, start), f_mul(w[r].d, step), sums[r][t]);
                if (format == Q4_1) sums[r][t] = f_fma(w[r].m, f_groups(x->sums + at), sums[r][t]);
            }
        }
    }
    for (int r = 0; r < R && r0 + r < of->last; r++)
        for (int t = 0; t < T && t0 + t < of->m; t++) of->y[(t0 + t) * of->rows + r0 + r] = f_total(sums[r][t]);
}

ALWAYS_INLINE void int8_rows(const int format, const Product *of, const Activations *x) {
    enum { BLOCK = 32 }; /* tokens whose codes stay in the first-level cache while the rows pass */
    for (int64_t i = 0; i < of->m; i += BLOCK)
        for (int64_t r = of->first; r < of->last; r += INT8_ROWS)
            for (int64_t t = i; t < i + BLOCK && t < of->m; t += INT8_TOKENS) {
                if (t + 1 == of->m) int8_tile(format, INT8_ROWS, 1, of, x, r, t);
                else int8_tile(format, INT8_ROWS, INT8_TOKENS, of, x, r, t);
            }
}

void INT8_PRODUCT(const Product *of, const Activations *x) {
    switch (of->format) {
        case Q4_0: int8_rows(Q4_0, of, x); break;
        case Q4_1: int8_rows(Q4_1, of, x); break;
        case Q8_0: int8_rows(Q8_0, of, x); break;
        case ROW_INT8: int8_rows(ROW_INT8, of, x); break;
        case ROW_INT4: int8_rows(ROW_INT4, of, x); break;
    }
}
