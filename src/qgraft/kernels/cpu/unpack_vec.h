/* 32 weights of a packed row in vector registers, for AVX2 (four vectors of 8 floats) and AVX-512 (two of 16).
 *
 * `weights32` is the only place where these levels read bit layouts, but for codes.h and chunks.h; unpacking a row stores its vectors, a product
 * multiplies them without going through memory. Values are bit for bit those of unpack.h: a code times a scale of 11 to
 * 18 bits is exact in a float, so one fused multiply-add rounds where the plain code does, once.
 *
 * With AVX-512 a 4-bit code is an index: one permutation looks 16 codes up in a register that holds the block's 16
 * possible weights, instead of a conversion and a multiply-add for each vector.
 */

#ifndef QGRAFT_UNPACK_VEC_H
#define QGRAFT_UNPACK_VEC_H

#include <stdint.h>
#include <string.h>

#include "codes.h"
#include "common.h"
#include "formats.h"
#include "unpack.h"
#include "vec.h"

/* w = (q - zero) * d, or q * d + m, with q the low 4 bits of each lane. */
ALWAYS_INLINE void scale_nibbles(const vint *q, int zero, int has_m, vfloat d, vfloat m, int parts, vfloat *w) {
#if defined(__AVX512BW__)
    const vint codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const vfloat table = has_m ? v_fma(v_int(codes), d, m) : v_mul(v_int(i_sub(codes, i_set(zero))), d);
    for (int i = 0; i < parts; i++) w[i] = _mm512_permutexvar_ps(q[i], table);
#else
    for (int i = 0; i < parts; i++) {
        const vint code = i_and(q[i], i_set(15));
        w[i] = has_m ? v_fma(v_int(code), d, m) : v_mul(v_int(i_sub(code, i_set(zero))), d);
    }
#endif
}

/* 16 bytes -> 32 codes in the low 4 bits of each lane: low nibbles first; what is above those bits is not cleared. */
ALWAYS_INLINE void nibbles(const uint8_t *p, vint *q) {
    for (int i = 0; i < PARTS / 2; i++) {
        q[i] = i_u8(p + LANES * i);
        q[PARTS / 2 + i] = i_shr(q[i], 4);
    }
}

/* As `nibbles`, with the fifth bits of 4 bytes; above them all is clear. */
ALWAYS_INLINE void five_bits(const uint8_t *fifth, const uint8_t *low, vint *q) {
    uint32_t bits;
    memcpy(&bits, fifth, 4);
    nibbles(low, q);
    for (int i = 0; i < PARTS; i++) q[i] = i_or(i_and(q[i], i_set(15)), i_fifth(bits >> (LANES * i)));
}

/* The scales of chunks first <= k < last of a K-quant's 256 weights, or of all, floats that `weights32` reads: of chunk k the
 * step at k and the minimum at 8 + k, or the steps of its halves at 2 k and 2 k + 1 (and their minimums 16 further). */
ALWAYS_INLINE void read_k_scales(const int format, const uint8_t *block, int first, int last, float k_scales[K_SCALES]) {
    if (is_chunked(format)) {
        for (int k = first; k < last; k++) chunk_scales(format, block, k, k_scales);
    } else if (format == Q6_K) {
        const __m256 d = _mm256_set1_ps(_cvtsh_ss((uint16_t)(block[208] | block[209] << 8)));
        for (int k = 0; k < 16; k += 8) {
            const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(block + 192 + k)));
            _mm256_storeu_ps(k_scales + k, _mm256_mul_ps(d, _mm256_cvtepi32_ps(codes)));
        }
    } else {
        const float d = _cvtsh_ss((uint16_t)(block[0] | block[1] << 8));
        const float dmin = _cvtsh_ss((uint16_t)(block[2] | block[3] << 8));
        uint8_t codes[16];
        unpack_k_scales(block + 4, codes, codes + 8);
        for (int k = 0; k < 16; k += 8) {
            const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + k)));
            _mm256_storeu_ps(k_scales + k, _mm256_mul_ps(_mm256_set1_ps(k ? -dmin : d), _mm256_cvtepi32_ps(wide)));
        }
    }
}

/* Weights 32 c to 32 c + 31 of `row`; `k_scales` from read_k_scales of their block, `scale` of the row where it has one. */
ALWAYS_INLINE void weights32(const int format, const uint8_t *row, int64_t c, float scale, const float *k_scales, vfloat *w) {
    vint q[PARTS];
    const uint8_t *p = row + (is_k_quant(format) ? row_bytes(format, c / 8 * 256) : row_bytes(format, c * 32));
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
            const vfloat d = v_half(p);
            five_bits(p + 2, p + 6, q);
            for (int i = 0; i < PARTS; i++) w[i] = v_mul(v_int(i_sub(q[i], i_set(16))), d);
            break;
        }
        case Q5_1: {
            const vfloat d = v_half(p), m = v_half(p + 2);
            five_bits(p + 4, p + 8, q);
            for (int i = 0; i < PARTS; i++) w[i] = v_fma(v_int(q[i]), d, m);
            break;
        }
        case Q8_0: {
            const vfloat d = v_half(p);
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
            scale_nibbles(q, 0, 1, v_set(k_scales[k]), v_set(k_scales[8 + k]), PARTS, w);
            break;
        case Q5_K:
            for (int i = 0; i < PARTS; i++) {
                const vint low = i_and(i_shr(i_u8(p + 48 + k / 2 * 32 + LANES * i), 4 * (k & 1)), i_set(15));
                const vint high = i_and(i_shl(i_shr(i_u8(p + 16 + LANES * i), k), 4), i_set(16));
                w[i] = v_fma(v_int(i_or(low, high)), v_set(k_scales[k]), v_set(k_scales[8 + k]));
            }
            break;
        case Q6_K:
            for (int i = 0; i < PARTS; i++) {
                const int at = k % 2 * 32 + LANES * i;
                const vint low = i_and(i_shr(i_u8(p + k / 4 * 64 + at), k % 4 / 2 * 4), i_set(15));
                const vint high = i_shl(i_and(i_shr(i_u8(p + 128 + k / 4 * 32 + LANES * i), k % 4 * 2), i_set(3)), 4);
                w[i] = v_mul(v_int(i_sub(i_or(low, high), i_set(32))), v_set(k_scales[2 * k + LANES * i / 16]));
            }
            break;
        case IQ4_NL: case IQ4_XS: case MXFP4: case NVFP4: {
            uint8_t levels[32];
            float d[2];
            codebook_chunk(format, row, c, d);
            _mm256_storeu_si256((__m256i *)levels, codes32(format, row, c));
            for (int i = 0; i < PARTS; i++) w[i] = v_mul(v_int(i_s8(levels + LANES * i)), v_set(d[LANES * i / 16]));
            break;
        }
        default: { /* is_chunked */
            int8_t codes[32];
            chunk_codes(format, p, k, codes);
            for (int i = 0; i < PARTS; i++) {
                const vfloat code = v_int(i_s8((const uint8_t *)codes + LANES * i));
                const float *scales = k_scales + 2 * k + LANES * i / 16;
                w[i] = has_minimum(format) ? v_fma(code, v_set(scales[0]), v_set(scales[16])) : v_mul(code, v_set(scales[0]));
            }
        }
    }
}

/* Whole chunks of a row -> floats, or bfloat16 numbers where `out` is NULL. */
ALWAYS_INLINE void unpack_chunks(const int format, const uint8_t *row, int64_t columns, float scale, float *out,
                                 uint16_t *halves) {
    float k_scales[K_SCALES];
    for (int64_t c = 0; c < columns / 32; c++) {
        vfloat w[PARTS];
        if (is_k_quant(format) && c % 8 == 0) read_k_scales(format, row + row_bytes(format, c * 32), 0, 8, k_scales);
        weights32(format, row, c, scale, k_scales, w);
        for (int i = 0; i < PARTS; i++) {
            if (out) v_store(out + 32 * c + LANES * i, w[i]);
            else v_store_bf16(halves + 32 * c + LANES * i, w[i]);
        }
    }
}

static void unpack_row(int format, const uint8_t *row, int64_t columns, float scale, float *out) {
    const int64_t whole = columns / 32 * 32;
#define UNPACK(FORMAT) unpack_chunks(FORMAT, row, whole, scale, out, NULL)
    FOR_FORMAT(format, UNPACK)
#undef UNPACK
    if (whole < columns) unpack_row_plain(format, row + row_bytes(format, whole), columns - whole, scale, out + whole);
}

static void unpack_row_bf16(int format, const uint8_t *row, int64_t columns, float scale, uint16_t *out) {
    const int64_t whole = columns / 32 * 32;
#define UNPACK(FORMAT) unpack_chunks(FORMAT, row, whole, scale, NULL, out)
    FOR_FORMAT(format, UNPACK)
#undef UNPACK
    if (whole < columns) unpack_row_plain_bf16(format, row + row_bytes(format, whole), columns - whole, scale, out + whole);
}

#endif
