/* The sum of code * x in a chunk of 32 columns, for codes of 4 bits that neither are unpacked to bytes nor scaled (gemv_codes.h).
 *
 * AVX-512 looks them up in a register of the 16 numbers that they stand for, as unpack_vec.h does in one of the 16 weights.
 *
 * On AVX2 they are not even shifted: a mask leaves byte s of each 32 bits, which is 256^s times the code, and x is divided by
 * that beforehand, which is exact. So x is first put in the order in which masks take the codes apart: vector s holds the
 * columns of bytes 4 i + s of the chunk, those of its low codes in front of those of its high ones (row-wise int4: high first).
 */

#ifndef QGRAFT_GEMV_NIBBLES_H
#define QGRAFT_GEMV_NIBBLES_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "unpack.h"
#include "unpack_vec.h"
#include "vec.h"

/* The nibbles of chunk c; of q4_k the bytes that it shares with the chunk beside it. */
ALWAYS_INLINE const uint8_t *nibbles_of(const int format, const uint8_t *row, int64_t c) {
    const uint8_t *p = row + row_bytes(format, 32 * c);
    switch (format) {
        case Q4_0: case IQ4_NL: return p + 2;
        case Q4_1: return p + 4;
        case MXFP4: return p + 1;
        case Q4_K: return p + 16 + c % 8 / 2 * 32;
        case IQ4_XS: return p + 8 + c % 8 * 16;
        default: return p; /* ROW_INT4 */
    }
}

#if defined(__AVX512BW__)

ALWAYS_INLINE int has_nibbles(int format) {
    return format == Q4_0 || format == Q4_1 || format == ROW_INT4 || format == Q4_K || (is_codebook(format) && format != NVFP4);
}

/* What is added to each number that a code stands for. */
ALWAYS_INLINE int zero_of(int format) { (void)format; return 0; }

ALWAYS_INLINE int has_order(int format) { (void)format; return 0; }
static void order_chunk(int format, const float *x, float *to) { (void)format, (void)x, (void)to; }

/* The numbers that codes stand for, before they are scaled. */
ALWAYS_INLINE vfloat numbers_of(const int format) {
    if (is_codebook(format)) return v_int(i_s8((const uint8_t *)levels_of(format)));
    const vint codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), eight = i_set(8);
    return v_int(format == ROW_INT4 ? i_sub(i_xor(codes, eight), eight) : format == Q4_0 ? i_sub(codes, eight) : codes);
}

/* 16 parts of the sum. */
ALWAYS_INLINE vfloat nibbles_times_x(const int format, const uint8_t *row, int64_t c, vfloat numbers, const vfloat *x) {
    const uint8_t *p = nibbles_of(format, row, c);
    vint q[2];
    if (format == ROW_INT4) q[0] = i_pairs(p), q[1] = i_pairs(p + 8);
    else if (format == Q4_K)
        for (int i = 0; i < 2; i++) q[i] = i_shr(i_u8(p + 16 * i), 4 * (int)(c & 1));
    else nibbles(p, q);
    const vfloat sum = v_mul(_mm512_permutexvar_ps(q[0], numbers), x[0]);
    return v_fma(_mm512_permutexvar_ps(q[1], numbers), x[1], sum);
}

#else

ALWAYS_INLINE int has_nibbles(int format) {
    return format == Q4_0 || format == Q4_1 || format == ROW_INT4 || format == Q4_K;
}
ALWAYS_INLINE int zero_of(int format) { return format == Q4_0 || format == ROW_INT4 ? -8 : 0; }
ALWAYS_INLINE int has_order(int format) { return has_nibbles(format); }
ALWAYS_INLINE vfloat numbers_of(const int format) { (void)format; return v_zero(); }

static void order_chunk(int format, const float *x, float *to) {
    const int pairs = format == ROW_INT4, step = pairs ? 2 : 1, second = pairs ? 1 : 16;
    float share = 1.0f;
    for (int s = 0; s < 4; s++, to += 8, share *= 0x1p-8f)
        for (int i = 0; i < 4; i++) {
            const int column = step * (4 * i + s);
            to[i] = x[column] * share, to[4 + i] = x[column + second] * share;
        }
}

/* 8 parts of the sum. */
ALWAYS_INLINE vfloat nibbles_times_x(const int format, const uint8_t *row, int64_t c, vfloat numbers, const vfloat *x) {
    (void)numbers;
    const uint8_t *p = nibbles_of(format, row, c);
    vint q;
    if (format == Q4_K) {
        q = i_shr(i_load(p), 4 * (int)(c & 1));
    } else {
        const int low = format == ROW_INT4 ? 4 : 0;
        q = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
        q = _mm256_srlv_epi32(q, _mm256_setr_epi32(low, low, low, low, 4 - low, 4 - low, 4 - low, 4 - low));
        if (format == ROW_INT4) q = i_xor(q, i_set8(8)); /* signed codes, more 8 */
    }
    vfloat sum = v_mul(v_int(i_and(q, i_set(0x0f))), x[0]);
    sum = v_fma(v_int(i_and(q, i_set(0x0f00))), x[1], sum);
    sum = v_fma(v_int(i_and(q, i_set(0x0f0000))), x[2], sum);
    return v_fma(v_int(i_and(q, i_set(0x0f000000))), x[3], sum);
}

#endif

#endif
