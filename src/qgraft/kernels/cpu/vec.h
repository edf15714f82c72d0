/* The vocabulary of vectors: one name for what AVX-512, AVX2 and any other CPU each have an instruction (or four) for.
 *
 *     vfloat, v_*   LANES floats: 16, 8, or 4 where the compiler makes of them what the CPU has
 *     vint, i_*     the same registers as 32-bit integers or bytes; AVX2 and AVX-512 alone
 *
 * Which of the three is compiled follows from the `#pragma GCC target` in front. Bit layouts are read with these words in
 * unpack_vec.h (AVX2: and in codes.h), products are summed in gemv.h, gemm.h, gemm_int8.h, varlen_attention.h
 * and gemm_int8_panels.h.
 */

#ifndef QGRAFT_VEC_H
#define QGRAFT_VEC_H

#include <stdint.h>
#include <string.h>

#include "common.h"

#if defined(__AVX512BW__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#endif

#if defined(__AVX2__)

/* The sum of 8 lanes, and those of a, b, c and d: AVX-512 has uses for these, too. */
ALWAYS_INLINE float sum_of_eight(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

ALWAYS_INLINE __m128 sum4_of_eight(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

#endif

#if defined(__AVX512BW__)

typedef __m512 vfloat;
typedef __m512i vint;
enum { LANES = 16 };
#define v_zero _mm512_setzero_ps
#define v_set _mm512_set1_ps
#define v_load _mm512_loadu_ps
#define v_store _mm512_storeu_ps
#define v_mul _mm512_mul_ps
#define v_add _mm512_add_ps
#define v_fma _mm512_fmadd_ps
#define v_sum _mm512_reduce_add_ps
#define v_int _mm512_cvtepi32_ps
#define v_bits _mm512_castsi512_ps
#define i_zero _mm512_setzero_si512
#define i_load(p) _mm512_loadu_si512(p)
#define i_set _mm512_set1_epi32
#define i_set8 _mm512_set1_epi8
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

ALWAYS_INLINE vfloat v_half(const uint8_t *p) {
    int16_t h;
    memcpy(&h, p, 2);
    return _mm512_cvtph_ps(_mm256_set1_epi16(h));
}

/* The sums of the lanes of a, b, c and d. */
ALWAYS_INLINE __m128 v_sum4(vfloat a, vfloat b, vfloat c, vfloat d) {
    const vfloat ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const vfloat cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const vfloat low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
    const vfloat abcd = _mm512_add_ps(low, high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Rounded to bfloat16, ties to even; NaN stays NaN. */
ALWAYS_INLINE void v_store_bf16(uint16_t *out, vfloat v) {
    const vint bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const vint up = _mm512_add_epi32(i_and(high, i_set(1)), i_set(0x7fff));
    const vint rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const vint kept = _mm512_mask_or_epi32(rounded, nan, high, i_set(0x40));
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(kept));
}

/* Bit j of the lowest LANES bits -> 16 in lane j. */
ALWAYS_INLINE vint i_fifth(uint32_t bits) { return _mm512_maskz_set1_epi32((__mmask16)bits, 16); }

/* 8 bytes -> 16 lanes, each byte twice: shifted by 4 in even lanes, as it is in odd ones. */
ALWAYS_INLINE vint i_pairs(const uint8_t *p) {
    const vint twice = _mm512_mullo_epi64(_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p)),
                                          _mm512_set1_epi64(0x100000001));
    return _mm512_srlv_epi32(twice, _mm512_set1_epi64(4));
}

/* 16 vectors of 16 lanes -> in lane i of the j-th what was in lane j of the i-th. */
ALWAYS_INLINE void v_transpose(vfloat *r) {
    vfloat t[16];
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
        const vfloat even = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        const vfloat even2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        const vfloat odd2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        r[j] = _mm512_shuffle_f32x4(even, even2, 0x88);
        r[4 + j] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        r[8 + j] = _mm512_shuffle_f32x4(even, even2, 0xdd);
        r[12 + j] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

#if defined(__AVX512BF16__)

/* low, high: 16 floats each -> 32 bfloat16 numbers in this order. */
ALWAYS_INLINE vfloat v_bf16(vfloat low, vfloat high) {
    return _mm512_castsi512_ps((vint)_mm512_cvtne2ps_pbh(high, low));
}

/* The same, each of `low` in front of that of `high`. */
ALWAYS_INLINE vfloat v_bf16_pairs(vfloat low, vfloat high) {
    const vint order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                        4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (vint)_mm512_cvtne2ps_pbh(high, low)));
}

/* sum + a0 b0 + a1 b1 of the pairs of bfloat16 numbers in each lane. */
ALWAYS_INLINE vfloat v_fma_pairs(vfloat a, vfloat b, vfloat sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

typedef __m256 vfloat;
typedef __m256i vint;
enum { LANES = 8 };
#define v_zero _mm256_setzero_ps
#define v_set _mm256_set1_ps
#define v_load _mm256_loadu_ps
#define v_store _mm256_storeu_ps
#define v_mul _mm256_mul_ps
#define v_add _mm256_add_ps
#define v_fma _mm256_fmadd_ps
#define v_int _mm256_cvtepi32_ps
#define v_bits _mm256_castsi256_ps
#define i_zero _mm256_setzero_si256
#define i_load(p) _mm256_loadu_si256((const __m256i *)(p))
#define i_set _mm256_set1_epi32
#define i_set8 _mm256_set1_epi8
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

ALWAYS_INLINE vfloat v_half(const uint8_t *p) {
    int16_t h;
    memcpy(&h, p, 2);
    return _mm256_cvtph_ps(_mm_set1_epi16(h));
}

#define v_sum sum_of_eight
#define v_sum4 sum4_of_eight

ALWAYS_INLINE void v_store_bf16(uint16_t *out, vfloat v) {
    const vint bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const vint up = _mm256_add_epi32(i_and(high, i_set(1)), i_set(0x7fff));
    const vint rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const vint nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const vint kept = _mm256_blendv_epi8(rounded, i_or(high, i_set(0x40)), nan);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    _mm_storeu_si128((__m128i *)out, halves);
}

ALWAYS_INLINE vint i_fifth(uint32_t bits) {
    const vint bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return i_and(_mm256_cmpeq_epi32(i_and(i_set((int)bits), bit), bit), i_set(16));
}

/* 4 bytes -> 8 lanes, likewise. */
ALWAYS_INLINE vint i_pairs(const uint8_t *p) {
    int32_t bytes;
    memcpy(&bytes, p, 4);
    const vint wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    return _mm256_srlv_epi32(i_or(wide, _mm256_slli_epi64(wide, 32)), _mm256_set1_epi64x(4));
}

ALWAYS_INLINE void v_transpose(vfloat *r) {
    vfloat t[8];
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
        const vfloat low = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        r[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
        r[j] = low;
    }
}

#else

typedef float vfloat __attribute__((vector_size(16)));
enum { LANES = 4 };
ALWAYS_INLINE vfloat v_load(const float *p) {
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}
ALWAYS_INLINE void v_store(float *p, vfloat v) { memcpy(p, &v, sizeof v); }
#define v_set(x) ((vfloat){x, x, x, x})
#define v_zero() v_set(0.0f)
#define v_fma(a, b, c) ((c) + (a) * (b))

#endif

enum { PARTS = 32 / LANES }; /* vectors of 32 weights */

/* Four floats, which every CPU of 64 bits has registers for. */
typedef float vfloat4 __attribute__((vector_size(16)));
#if defined(__clang__)
#define V4_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t vint4 __attribute__((vector_size(16)));
#define V4_PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (vint4){i, j, k, l})
#endif

/* Numbers d to d + 3 of 4 rows -> 4 rows of one number of each, `stride` apart. */
ALWAYS_INLINE void transpose4x4(const float *const *rows, int64_t d, float *out, int64_t stride) {
    vfloat4 r[4], c[4];
    for (int i = 0; i < 4; i++) memcpy(&r[i], rows[i] + d, sizeof(vfloat4));
    const vfloat4 low_a = V4_PICK(r[0], r[1], 0, 4, 1, 5), high_a = V4_PICK(r[0], r[1], 2, 6, 3, 7);
    const vfloat4 low_b = V4_PICK(r[2], r[3], 0, 4, 1, 5), high_b = V4_PICK(r[2], r[3], 2, 6, 3, 7);
    c[0] = V4_PICK(low_a, low_b, 0, 1, 4, 5), c[1] = V4_PICK(low_a, low_b, 2, 3, 6, 7);
    c[2] = V4_PICK(high_a, high_b, 0, 1, 4, 5), c[3] = V4_PICK(high_a, high_b, 2, 3, 6, 7);
    for (int i = 0; i < 4; i++) memcpy(out + i * stride, &c[i], sizeof(vfloat4));
}

#endif
