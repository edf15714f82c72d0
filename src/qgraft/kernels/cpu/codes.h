/* 32 codes of a packed row as signed bytes in one register of AVX2, in the order of their columns.
 *
 * What transposes or multiplies codes (panels.h, int8_panels.h) moves a quarter of the bytes that floats would be. The weight is
 * code * d, or code * d + m: bit for bit that of weights32, whose zero is taken off here already.
 */

#ifndef QGRAFT_CODES_H
#define QGRAFT_CODES_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "unpack.h"
#include "vec.h"

/* 16 bytes -> 32 codes of 4 bits, low nibbles first. */
ALWAYS_INLINE __m256i nibble_bytes(const uint8_t *p) {
    const __m128i both = _mm_loadu_si128((const __m128i *)p);
    const __m256i wide = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
    return _mm256_and_si256(wide, _mm256_set1_epi8(15));
}

/* The fifth bits of 32 codes: 16 where the bit is set. */
ALWAYS_INLINE __m256i fifth_bytes(const uint8_t *p) {
    int32_t bits;
    memcpy(&bits, p, 4);
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(16));
}

/* 16 bytes of pairs, the first code in the high nibble and signed -> 32 codes. */
ALWAYS_INLINE __m256i pair_bytes(const uint8_t *p) {
    const __m128i both = _mm_loadu_si128((const __m128i *)p), low = _mm_set1_epi8(15), sign = _mm_set1_epi8(8);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(both, 4), low), odd = _mm_and_si128(both, low);
    const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    const __m256i signs = _mm256_broadcastsi128_si256(sign);
    return _mm256_sub_epi8(_mm256_xor_si256(codes, signs), signs);
}

/* Bits `shift` and above of 32 bytes, those of `mask`. */
ALWAYS_INLINE __m256i bits_of(const uint8_t *p, int shift, int mask) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i *)p);
    return _mm256_and_si256(_mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8((char)mask));
}

/* 16 bytes of places in a codebook -> 32 levels, in the order of nibbles; `runs`: of 8 bytes each. */
ALWAYS_INLINE __m256i level_bytes(const int8_t *levels, const uint8_t *p, int runs) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)levels)), places = nibble_bytes(p);
    return _mm256_shuffle_epi8(table, runs ? _mm256_permute4x64_epi64(places, 0xd8) : places);
}

/* Codes 32 c to 32 c + 31 of `row`; of a codebook its levels. */
ALWAYS_INLINE __m256i codes32(const int format, const uint8_t *row, int64_t c) {
    const int k = (int)(c % 8);
    const uint8_t *p = row + (is_k_quant(format) ? row_bytes(format, c / 8 * 256) : row_bytes(format, c * 32));
    switch (format) {
        case Q4_0: return _mm256_sub_epi8(nibble_bytes(p + 2), _mm256_set1_epi8(8));
        case Q4_1: return nibble_bytes(p + 4);
        case Q5_0: return _mm256_sub_epi8(_mm256_or_si256(nibble_bytes(p + 6), fifth_bytes(p + 2)), _mm256_set1_epi8(16));
        case Q5_1: return _mm256_or_si256(nibble_bytes(p + 8), fifth_bytes(p + 4));
        case Q8_0: return _mm256_loadu_si256((const __m256i *)(p + 2));
        case ROW_INT8: return _mm256_loadu_si256((const __m256i *)p);
        case ROW_INT4: return pair_bytes(p);
        case Q4_K: return bits_of(p + 16 + k / 2 * 32, 4 * (k & 1), 15);
        case Q5_K: {
            const __m256i fifth = _mm256_slli_epi16(bits_of(p + 16, k, 1), 4);
            return _mm256_or_si256(bits_of(p + 48 + k / 2 * 32, 4 * (k & 1), 15), fifth);
        }
        case IQ4_NL: return level_bytes(levels_of(format), p + 2, 0);
        case IQ4_XS: return level_bytes(levels_of(format), p + 8 + 16 * k, 0);
        case MXFP4: return level_bytes(levels_of(format), p + 1, 0);
        case NVFP4: return level_bytes(levels_of(format), p + 4 + k % 2 * 16, 1);
        default: { /* Q6_K */
            const __m256i high = _mm256_slli_epi16(bits_of(p + 128 + k / 4 * 32, k % 4 * 2, 3), 4);
            const __m256i low = bits_of(p + k / 4 * 64 + k % 2 * 32, k % 4 / 2 * 4, 15);
            return _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
        }
    }
}

/* 8 rows of 32 bytes -> the bytes of column j, one of each row, at columns[j]. */
ALWAYS_INLINE void transpose_bytes(const __m256i *rows, uint8_t columns[32][8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[i] = _mm256_unpacklo_epi8(rows[2 * i], rows[2 * i + 1]);     /* columns 0 to 7 of each half, of two rows */
        a[4 + i] = _mm256_unpackhi_epi8(rows[2 * i], rows[2 * i + 1]); /* 8 to 15 */
    }
    for (int i = 0; i < 8; i += 2) { /* b[2 i]: columns 4 i to 4 i + 3 of rows 0 to 3; b[2 i + 1]: of rows 4 to 7 */
        const int to = i / 4 * 4 + i % 4 / 2;
        b[to] = _mm256_unpacklo_epi16(a[i], a[i + 1]);
        b[to + 2] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        const __m256i first = b[2 * i], second = b[2 * i + 1];
        const __m256i two[2] = {_mm256_unpacklo_epi32(first, second), _mm256_unpackhi_epi32(first, second)};
        for (int j = 0; j < 2; j++) {
            _mm_storeu_si128((__m128i *)columns[4 * i + 2 * j], _mm256_castsi256_si128(two[j]));
            _mm_storeu_si128((__m128i *)columns[16 + 4 * i + 2 * j], _mm256_extracti128_si256(two[j], 1));
        }
    }
}

#endif
