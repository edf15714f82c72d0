/* 32 weights of a packed row in vector registers, for AVX2 (four vectors of 8 floats) and AVX-512 (two of 16).
 *
 * `weights32` is the only place where these levels read bit layouts; unpacking a row stores its vectors, a product
 * multiplies them without going through memory. Values are bit for bit those of rows.h: a code times a scale of 11 to
 * 18 bits is exact in a float, so one fused multiply-add rounds where the plain code does, once.
 *
 * With AVX-512 a 4-bit code is an index: one permutation looks 16 codes up in a register that holds the block's 16
 * possible weights, instead of a conversion and a multiply-add for each vector.
 */

#include <immintrin.h>

#include "native.h"

#if defined(__AVX512BW__)

typedef __m512 V;  /* floats */
typedef __m512i I; /* 32-bit integers */
enum { LANES = 16, PARTS = 32 / LANES };
#define v_zero _mm512_setzero_ps
#define v_set _mm512_set1_ps
#define v_load _mm512_loadu_ps
#define v_store _mm512_storeu_ps
#define v_mul _mm512_mul_ps
#define v_fma _mm512_fmadd_ps
#define v_int _mm512_cvtepi32_ps
#define v_bits _mm512_castsi512_ps
#define i_set _mm512_set1_epi32
#define i_and _mm512_and_si512
#define i_or _mm512_or_si512
#define i_xor _mm512_xor_si512
#define i_sub _mm512_sub_epi32
#define i_shl(a, n) _mm512_sll_epi32(a, _mm_cvtsi32_si128(n))
#define i_shr(a, n) _mm512_srl_epi32(a, _mm_cvtsi32_si128(n))
#define i_u8(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define i_s8(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define i_u16(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define v_halves(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))

ALWAYS_INLINE V v_half(const uint8_t *p) {
    int16_t h;
    memcpy(&h, p, 2);
    return _mm512_cvtph_ps(_mm256_set1_epi16(h));
}

/* The sums of the lanes of a, b, c and d. */
ALWAYS_INLINE __m128 v_sum4(V a, V b, V c, V d) {
    const V ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const V cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const V low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
    const V abcd = _mm512_add_ps(low, high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Rounded to bfloat16, ties to even; NaN stays NaN. */
ALWAYS_INLINE void v_store_bf16(uint16_t *out, V v) {
    const I bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const I up = _mm512_add_epi32(i_and(high, i_set(1)), i_set(0x7fff));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const I kept = _mm512_mask_or_epi32(rounded, nan, high, i_set(0x40));
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(kept));
}

/* Bit j of the lowest LANES bits -> 16 in lane j. */
ALWAYS_INLINE I i_fifth(uint32_t bits) { return _mm512_maskz_set1_epi32((__mmask16)bits, 16); }

/* 8 bytes -> 16 lanes, each byte twice: shifted by 4 in even lanes, as it is in odd ones. */
ALWAYS_INLINE I i_pairs(const uint8_t *p) {
    const __m512i twice = _mm512_mullo_epi64(_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p)),
                                             _mm512_set1_epi64(0x100000001));
    return _mm512_srlv_epi32(twice, _mm512_set1_epi64(4));
}

/* 16 vectors of 16 lanes -> in lane i of the j-th what was in lane j of the i-th. */
ALWAYS_INLINE void transpose(V *r) {
    V t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#define PD(a) _mm512_castps_pd(a)
#define PS(a) _mm512_castpd_ps(a)
    for (int i = 0; i < 16; i += 4) { /* the j-th of a quarter: columns j, j + 4, j + 8, j + 12 of four rows */
        r[i] = PS(_mm512_unpacklo_pd(PD(t[i]), PD(t[i + 2])));
        r[i + 1] = PS(_mm512_unpackhi_pd(PD(t[i]), PD(t[i + 2])));
        r[i + 2] = PS(_mm512_unpacklo_pd(PD(t[i + 1]), PD(t[i + 3])));
        r[i + 3] = PS(_mm512_unpackhi_pd(PD(t[i + 1]), PD(t[i + 3])));
    }
#undef PD
#undef PS
    for (int j = 0; j < 4; j++) {
        const V even = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        const V even2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        const V odd2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        r[j] = _mm512_shuffle_f32x4(even, even2, 0x88);
        r[4 + j] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        r[8 + j] = _mm512_shuffle_f32x4(even, even2, 0xdd);
        r[12 + j] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

#if defined(__AVX512BF16__)

/* low, high: 16 floats each -> 32 bfloat16 numbers in this order. */
ALWAYS_INLINE V v_bf16(V low, V high) { return _mm512_castsi512_ps((I)_mm512_cvtne2ps_pbh(high, low)); }

/* The same, each of `low` in front of that of `high`. */
ALWAYS_INLINE V v_bf16_pairs(V low, V high) {
    const I order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                     4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (I)_mm512_cvtne2ps_pbh(high, low)));
}

/* sum + a0 b0 + a1 b1 of the pairs of bfloat16 numbers in each lane. */
ALWAYS_INLINE V v_fma_pairs(V a, V b, V sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

#endif

#else

typedef __m256 V;
typedef __m256i I;
enum { LANES = 8, PARTS = 32 / LANES };
#define v_zero _mm256_setzero_ps
#define v_set _mm256_set1_ps
#define v_load _mm256_loadu_ps
#define v_store _mm256_storeu_ps
#define v_mul _mm256_mul_ps
#define v_fma _mm256_fmadd_ps
#define v_int _mm256_cvtepi32_ps
#define v_bits _mm256_castsi256_ps
#define i_set _mm256_set1_epi32
#define i_and _mm256_and_si256
#define i_or _mm256_or_si256
#define i_xor _mm256_xor_si256
#define i_sub _mm256_sub_epi32
#define i_shl(a, n) _mm256_sll_epi32(a, _mm_cvtsi32_si128(n))
#define i_shr(a, n) _mm256_srl_epi32(a, _mm_cvtsi32_si128(n))
#define i_u8(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define i_s8(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define i_u16(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define v_halves(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))

ALWAYS_INLINE V v_half(const uint8_t *p) {
    int16_t h;
    memcpy(&h, p, 2);
    return _mm256_cvtph_ps(_mm_set1_epi16(h));
}

/* The sums of the lanes of a, b, c and d. */
ALWAYS_INLINE __m128 v_sum4(V a, V b, V c, V d) {
    const V ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const V cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const V low = _mm256_shuffle_ps(ab, cd, 0x44), high = _mm256_shuffle_ps(ab, cd, 0xee);
    const V abcd = _mm256_add_ps(low, high);
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

ALWAYS_INLINE void v_store_bf16(uint16_t *out, V v) {
    const I bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const I up = _mm256_add_epi32(i_and(high, i_set(1)), i_set(0x7fff));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I kept = _mm256_blendv_epi8(rounded, i_or(high, i_set(0x40)), nan);
    const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    _mm_storeu_si128((__m128i *)out, narrow);
}

ALWAYS_INLINE I i_fifth(uint32_t bits) {
    const I bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return i_and(_mm256_cmpeq_epi32(i_and(i_set((int)bits), bit), bit), i_set(16));
}

ALWAYS_INLINE void transpose(V *r) {
    V t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) { /* the j-th of a half: columns j and j + 4 of four rows */
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int j = 0; j < 4; j++) {
        const V low = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        r[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
        r[j] = low;
    }
}

/* 4 bytes -> 8 lanes, each byte twice: shifted by 4 in even lanes, as it is in odd ones. */
ALWAYS_INLINE I i_pairs(const uint8_t *p) {
    int32_t bytes;
    memcpy(&bytes, p, 4);
    const __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    return _mm256_srlv_epi32(i_or(wide, _mm256_slli_epi64(wide, 32)), _mm256_set1_epi64x(4));
}

#endif

/* w = (q - zero) * d, or q * d + m, with q the low 4 bits of each lane. */
ALWAYS_INLINE void scale_nibbles(const I *q, int zero, int has_m, V d, V m, int parts, V *w) {
#if defined(__AVX512BW__)
    const I codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const V table = has_m ? v_fma(v_int(codes), d, m) : v_mul(v_int(i_sub(codes, i_set(zero))), d);
    for (int i = 0; i < parts; i++) w[i] = _mm512_permutexvar_ps(q[i], table);
#else
    for (int i = 0; i < parts; i++) {
        const I code = i_and(q[i], i_set(15));
        w[i] = has_m ? v_fma(v_int(code), d, m) : v_mul(v_int(i_sub(code, i_set(zero))), d);
    }
#endif
}

/* 16 bytes -> 32 codes in the low 4 bits of each lane: low nibbles first; what is above those bits is not cleared. */
ALWAYS_INLINE void nibbles(const uint8_t *p, I *q) {
    for (int i = 0; i < PARTS / 2; i++) {
        q[i] = i_u8(p + LANES * i);
        q[PARTS / 2 + i] = i_shr(q[i], 4);
    }
}

/* As `nibbles`, with the fifth bits of 4 bytes; above them all is clear. */
ALWAYS_INLINE void five_bits(const uint8_t *fifth, const uint8_t *low, I *q) {
    uint32_t bits;
    memcpy(&bits, fifth, 4);
    nibbles(low, q);
    for (int i = 0; i < PARTS; i++) q[i] = i_or(i_and(q[i], i_set(15)), i_fifth(bits >> (LANES * i)));
}

/* The scales of a K-quant's 256 weights, floats that `weights32` reads: 8 steps and 8 minimums, or 16 steps. */
ALWAYS_INLINE void read_sub(const int format, const uint8_t *block, float sub[16]) {
    if (format == Q6_K) {
        const float d = _cvtsh_ss((uint16_t)(block[208] | block[209] << 8));
        for (int k = 0; k < 16; k++) sub[k] = d * (float)(int8_t)block[192 + k];
    } else {
        const float d = _cvtsh_ss((uint16_t)(block[0] | block[1] << 8));
        const float dmin = _cvtsh_ss((uint16_t)(block[2] | block[3] << 8));
        uint8_t scales[8], minimums[8];
        read_pairs(block + 4, scales, minimums);
        for (int k = 0; k < 8; k++) sub[k] = d * (float)(int)scales[k], sub[8 + k] = -(dmin * (float)(int)minimums[k]);
    }
}

ALWAYS_INLINE int has_sub(const int format) { return format == Q4_K || format == Q5_K || format == Q6_K; }

/* Weights 32 c to 32 c + 31 of `row`; `sub` from read_sub of their block, `scale` of the row where it has one. */
ALWAYS_INLINE void weights32(const int format, const uint8_t *row, int64_t c, float scale, const float *sub, V *w) {
    I q[PARTS];
    const uint8_t *p = row + (has_sub(format) ? row_bytes(format, c / 8 * 256) : row_bytes(format, c * 32));
    const int k = (int)(c % 8);
    switch (format) {
        case Q4_0:
            nibbles(p + 2, q);
            scale_nibbles(q, 8, 0, v_half(p), v_zero(), PARTS, w);
            break;
        case Q4_1:
            nibbles(p + 4, q);
            scale_nibbles(q, 0, 1, v_half(p), v_half(p + 2), PARTS, w);
            break;
        case Q5_0: {
            const V d = v_half(p);
            five_bits(p + 2, p + 6, q);
            for (int i = 0; i < PARTS; i++) w[i] = v_mul(v_int(i_sub(q[i], i_set(16))), d);
            break;
        }
        case Q5_1: {
            const V d = v_half(p), m = v_half(p + 2);
            five_bits(p + 4, p + 8, q);
            for (int i = 0; i < PARTS; i++) w[i] = v_fma(v_int(q[i]), d, m);
            break;
        }
        case Q8_0: {
            const V d = v_half(p);
            for (int i = 0; i < PARTS; i++) w[i] = v_mul(v_int(i_s8(p + 2 + LANES * i)), d);
            break;
        }
        case ROW_INT8:
            for (int i = 0; i < PARTS; i++) w[i] = v_mul(v_int(i_s8(p + LANES * i)), v_set(scale));
            break;
        case ROW_INT4: /* code ^ 8 is the signed nibble + 8 */
            for (int i = 0; i < PARTS; i++) q[i] = i_xor(i_pairs(p + LANES / 2 * i), i_set(8));
            scale_nibbles(q, 8, 0, v_set(scale), v_zero(), PARTS, w);
            break;
        case F16:
            for (int i = 0; i < PARTS; i++) w[i] = v_halves(p + 2 * LANES * i);
            break;
        case BF16:
            for (int i = 0; i < PARTS; i++) w[i] = v_bits(i_shl(i_u16(p + 2 * LANES * i), 16));
            break;
        case F32:
            for (int i = 0; i < PARTS; i++) w[i] = v_load((const float *)p + LANES * i);
            break;
        case Q4_K:
            for (int i = 0; i < PARTS; i++) q[i] = i_shr(i_u8(p + 16 + k / 2 * 32 + LANES * i), 4 * (k & 1));
            scale_nibbles(q, 0, 1, v_set(sub[k]), v_set(sub[8 + k]), PARTS, w);
            break;
        case Q5_K:
            for (int i = 0; i < PARTS; i++) {
                const I low = i_and(i_shr(i_u8(p + 48 + k / 2 * 32 + LANES * i), 4 * (k & 1)), i_set(15));
                const I high = i_and(i_shl(i_shr(i_u8(p + 16 + LANES * i), k), 4), i_set(16));
                w[i] = v_fma(v_int(i_or(low, high)), v_set(sub[k]), v_set(sub[8 + k]));
            }
            break;
        case Q6_K:
            for (int i = 0; i < PARTS; i++) {
                const int at = k % 2 * 32 + LANES * i;
                const I low = i_and(i_shr(i_u8(p + k / 4 * 64 + at), k % 4 / 2 * 4), i_set(15));
                const I high = i_shl(i_and(i_shr(i_u8(p + 128 + k / 4 * 32 + LANES * i), k % 4 * 2), i_set(3)), 4);
                w[i] = v_mul(v_int(i_sub(i_or(low, high), i_set(32))), v_set(sub[2 * k + LANES * i / 16]));
            }
            break;
    }
}

/* Whole chunks of a row -> floats, or bfloat16 numbers where `out` is NULL. */
ALWAYS_INLINE void unpack_chunks(const int format, const uint8_t *row, int64_t columns, float scale, float *out,
                                 uint16_t *halves) {
    float sub[16];
    for (int64_t c = 0; c < columns / 32; c++) {
        V w[PARTS];
        if (has_sub(format) && c % 8 == 0) read_sub(format, row + row_bytes(format, c * 32), sub);
        weights32(format, row, c, scale, sub, w);
        for (int i = 0; i < PARTS; i++) {
            if (out) v_store(out + 32 * c + LANES * i, w[i]);
            else v_store_bf16(halves + 32 * c + LANES * i, w[i]);
        }
    }
}

/* Expands to a switch that calls CALL(format) with `format` a constant, so that each call is compiled for its own. */
#define FOR_FORMAT(format, CALL)        \
    switch (format) {                   \
        case Q4_0: CALL(Q4_0); break;   \
        case Q4_1: CALL(Q4_1); break;   \
        case Q5_0: CALL(Q5_0); break;   \
        case Q5_1: CALL(Q5_1); break;   \
        case Q8_0: CALL(Q8_0); break;   \
        case ROW_INT8: CALL(ROW_INT8); break; \
        case ROW_INT4: CALL(ROW_INT4); break; \
        case F16: CALL(F16); break;     \
        case BF16: CALL(BF16); break;   \
        case F32: CALL(F32); break;     \
        case Q4_K: CALL(Q4_K); break;   \
        case Q5_K: CALL(Q5_K); break;   \
        case Q6_K: CALL(Q6_K); break;   \
    }

static void unpack_row(int format, const uint8_t *row, int64_t columns, float scale, float *out) {
    const int64_t whole = columns / 32 * 32;
#define UNPACK(FORMAT) unpack_chunks(FORMAT, row, whole, scale, out, NULL)
    FOR_FORMAT(format, UNPACK)
#undef UNPACK
    if (whole < columns) plain_row(format, row + row_bytes(format, whole), columns - whole, scale, out + whole);
}

static void unpack_row_bf16(int format, const uint8_t *row, int64_t columns, float scale, uint16_t *out) {
    const int64_t whole = columns / 32 * 32;
#define UNPACK(FORMAT) unpack_chunks(FORMAT, row, whole, scale, NULL, out)
    FOR_FORMAT(format, UNPACK)
#undef UNPACK
    if (whole < columns) plain_row_bf16(format, row + row_bytes(format, whole), columns - whole, scale, out + whole);
}
