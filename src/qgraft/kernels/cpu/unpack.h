/* Packed rows -> float rows in plain C: the bit layouts of formats/ggml.py, kquants.py and rowwise.py.
 *
 * The plain level computes with these; the vector levels use them for what does not fill a chunk of 32 weights.
 * The Python tests compare every value of every level with the torch reference, bit for bit.
 */

#ifndef QGRAFT_UNPACK_H
#define QGRAFT_UNPACK_H

#include <stdint.h>
#include <string.h>

#include "chunks.h"
#include "common.h"
#include "floats.h"
#include "formats.h"

/* q4_k, q5_k: 12 bytes -> 8 scales and 8 minimums of 6 bits, as in formats/kquants.py. */
ALWAYS_INLINE void unpack_k_scales(const uint8_t *p, uint8_t scales[8], uint8_t minimums[8]) {
    uint32_t a, b, c;
    memcpy(&a, p, 4), memcpy(&b, p + 4, 4), memcpy(&c, p + 8, 4);
    const uint32_t s[2] = {a & 0x3f3f3f3f, (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)};
    const uint32_t n[2] = {b & 0x3f3f3f3f, (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)};
    memcpy(scales, s, 8), memcpy(minimums, n, 8);
}

/* 18 bytes: half d, 16 bytes of nibbles (low: weights 0..15, high: 16..31). w = d * (q - 8) */
static void unpack_q4_0(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 18, out += 32) {
        const float d = half_to_float(p);
        for (int j = 0; j < 16; j++) out[j] = d * (float)((int)(p[2 + j] & 15) - 8);
        for (int j = 0; j < 16; j++) out[16 + j] = d * (float)((int)(p[2 + j] >> 4) - 8);
    }
}

/* 20 bytes: half d, half m, 16 bytes of nibbles. w = d * q + m */
static void unpack_q4_1(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 20, out += 32) {
        const float d = half_to_float(p), m = half_to_float(p + 2);
        for (int j = 0; j < 16; j++) out[j] = d * (float)(int)(p[4 + j] & 15) + m;
        for (int j = 0; j < 16; j++) out[16 + j] = d * (float)(int)(p[4 + j] >> 4) + m;
    }
}

/* 22 bytes: half d, 32 fifth bits, 16 bytes of nibbles. w = d * (q - 16) */
static void unpack_q5_0(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 22, out += 32) {
        const float d = half_to_float(p);
        uint32_t high;
        memcpy(&high, p + 2, 4);
        for (int j = 0; j < 16; j++) {
            const int q = (p[6 + j] & 15) | (int)((high >> j & 1) << 4);
            out[j] = d * (float)(q - 16);
        }
        for (int j = 0; j < 16; j++) {
            const int q = (p[6 + j] >> 4) | (int)((high >> (j + 16) & 1) << 4);
            out[16 + j] = d * (float)(q - 16);
        }
    }
}

/* 24 bytes: half d, half m, 32 fifth bits, 16 bytes of nibbles. w = d * q + m */
static void unpack_q5_1(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 24, out += 32) {
        const float d = half_to_float(p), m = half_to_float(p + 2);
        uint32_t high;
        memcpy(&high, p + 4, 4);
        for (int j = 0; j < 16; j++) {
            const int q = (p[8 + j] & 15) | (int)((high >> j & 1) << 4);
            out[j] = d * (float)q + m;
        }
        for (int j = 0; j < 16; j++) {
            const int q = (p[8 + j] >> 4) | (int)((high >> (j + 16) & 1) << 4);
            out[16 + j] = d * (float)q + m;
        }
    }
}

/* 34 bytes: half d, 32 signed bytes. w = d * q */
static void unpack_q8_0(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 34, out += 32) {
        const float d = half_to_float(p);
        const int8_t *q = (const int8_t *)(p + 2);
        for (int j = 0; j < 32; j++) out[j] = d * (float)q[j];
    }
}

/* one signed byte a weight, one scale a row */
static void unpack_int8(const uint8_t *p, int64_t columns, float scale, float *out) {
    const int8_t *q = (const int8_t *)p;
    for (int64_t j = 0; j < columns; j++) out[j] = (float)q[j] * scale;
}

/* two signed nibbles a byte, high nibble = even column, one scale a row */
static void unpack_int4(const uint8_t *p, int64_t columns, float scale, float *out) {
    for (int64_t j = 0; j < columns / 2; j++) {
        const int byte = (int8_t)p[j];
        const int low = (int8_t)(uint8_t)(p[j] << 4);
        out[2 * j] = (float)(byte >> 4) * scale;
        out[2 * j + 1] = (float)(low >> 4) * scale;
    }
}

/* IEEE half a weight */
static void unpack_f16(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t j = 0; j < columns; j++) out[j] = half_to_float(p + 2 * j);
}

/* 144 bytes of 256 weights: half d, half dmin, 12 bytes of scales, 128 bytes of nibbles (32 weights low, 32 high).
 * w = (d * scale) * q - dmin * minimum */
static void unpack_q4_k(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 256; b++, p += 144) {
        const float d = half_to_float(p), dmin = half_to_float(p + 2);
        uint8_t scales[8], minimums[8];
        unpack_k_scales(p + 4, scales, minimums);
        for (int k = 0; k < 8; k++, out += 32) {
            const float step = d * (float)scales[k], minimum = dmin * (float)minimums[k];
            const uint8_t *q = p + 16 + k / 2 * 32;
            const int shift = 4 * (k & 1);
            for (int j = 0; j < 32; j++) out[j] = step * (float)(int)(q[j] >> shift & 15) - minimum;
        }
    }
}

/* 176 bytes of 256 weights: as q4_k, with 32 bytes of fifth bits (bit k: weights 32 k ...) before the nibbles. */
static void unpack_q5_k(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 256; b++, p += 176) {
        const float d = half_to_float(p), dmin = half_to_float(p + 2);
        uint8_t scales[8], minimums[8];
        unpack_k_scales(p + 4, scales, minimums);
        for (int k = 0; k < 8; k++, out += 32) {
            const float step = d * (float)scales[k], minimum = dmin * (float)minimums[k];
            const uint8_t *q = p + 48 + k / 2 * 32, *high = p + 16;
            const int shift = 4 * (k & 1);
            for (int j = 0; j < 32; j++)
                out[j] = step * (float)(int)((q[j] >> shift & 15) | (high[j] >> k & 1) << 4) - minimum;
        }
    }
}

/* 210 bytes of 256 weights: 128 bytes of nibbles (64 weights low, 64 high), 64 bytes of two high bits, 16 signed bytes
 * of scales, half d. w = (d * scale) * (q - 32) */
static void unpack_q6_k(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 256; b++, p += 210) {
        const float d = half_to_float(p + 208);
        for (int k = 0; k < 16; k++, out += 16) {
            const float step = d * (float)(int8_t)p[192 + k];
            const uint8_t *low = p + k / 8 * 64 + k % 4 * 16, *high = p + 128 + k / 8 * 32 + k % 2 * 16;
            const int low_shift = k % 8 / 4 * 4, high_shift = k % 8 / 2 * 2;
            for (int j = 0; j < 16; j++) {
                const int q = (low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4;
                out[j] = step * (float)(q - 32);
            }
        }
    }
}

/* What the codes of a codebook stand for; floats of 4 bits are doubled. */
static const int8_t LEVELS_NL[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t LEVELS_E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

ALWAYS_INLINE const int8_t *levels_of(int format) { return format == MXFP4 || format == NVFP4 ? LEVELS_E2M1 : LEVELS_NL; }

/* Where the 16 bytes of nibbles of chunk c are, and the scales of its halves.
 * iq4_nl: 18 bytes: half d, nibbles.  mxfp4: 17: e8m0, nibbles.  nvfp4: 36 of 64 weights: 4 e4m3, nibbles in runs of 8 bytes.
 * iq4_xs: 136 of 256: half d, 16 high bits of scales, 4 bytes of low ones, nibbles; (d * scale). */
ALWAYS_INLINE const uint8_t *codebook_chunk(const int format, const uint8_t *row, int64_t c, float d[2]) {
    const uint8_t *p = row + row_bytes(format, 32 * c);
    const int k = (int)(c % 8);
    switch (format) {
        case IQ4_NL: d[0] = d[1] = half_to_float(p); return p + 2;
        case MXFP4: d[0] = d[1] = e8m0_to_float(p[0]); return p + 1;
        case NVFP4:
            for (int i = 0; i < 2; i++) d[i] = e4m3_to_float(p[k % 2 * 2 + i]);
            return p + 4 + k % 2 * 16;
        default: { /* IQ4_XS */
            const int low = p[4 + k / 2] >> (k % 2 * 4) & 15, high = p[2 + k / 4] >> (k % 4 * 2) & 3;
            d[0] = d[1] = half_to_float(p) * (float)((low | high << 4) - 32);
            return p + 8 + 16 * k;
        }
    }
}

/* w = d * level[q] */
static void unpack_codebook(int format, const uint8_t *row, int64_t columns, float *out) {
    const int8_t *levels = levels_of(format);
    const int run = format == NVFP4 ? 8 : 16; /* bytes: low nibbles, then high ones */
    for (int64_t c = 0; c < columns / 32; c++) {
        float d[2];
        const uint8_t *q = codebook_chunk(format, row, c, d);
        for (int i = 0; i < 16; i += run, out += 2 * run)
            for (int j = 0; j < run; j++) {
                out[j] = d[i / 8] * (float)levels[q[i + j] & 15];
                out[run + j] = d[i / 8] * (float)levels[q[i + j] >> 4];
            }
    }
}

/* w = step * code, or - minimum */
static void unpack_chunked(int format, const uint8_t *row, int64_t columns, float *out) {
    for (int64_t c = 0; c < columns / 32; c++, out += 32) {
        const uint8_t *block = row + row_bytes(format, 32 * c);
        const int k = (int)(c % 8);
        int8_t codes[32];
        float scales[K_SCALES];
        chunk_codes(format, block, k, codes);
        chunk_scales(format, block, k, scales);
        for (int j = 0; j < 32; j++) {
            const float w = scales[2 * k + j / 16] * (float)codes[j];
            out[j] = has_minimum(format) ? w + scales[16 + 2 * k + j / 16] : w;
        }
    }
}

static void unpack_row_plain(int format, const uint8_t *row, int64_t columns, float scale, float *out) {
    switch (format) {
        case Q4_0: unpack_q4_0(row, columns, out); break;
        case Q4_1: unpack_q4_1(row, columns, out); break;
        case Q5_0: unpack_q5_0(row, columns, out); break;
        case Q5_1: unpack_q5_1(row, columns, out); break;
        case Q8_0: unpack_q8_0(row, columns, out); break;
        case ROW_INT8: unpack_int8(row, columns, scale, out); break;
        case ROW_INT4: unpack_int4(row, columns, scale, out); break;
        case F16: unpack_f16(row, columns, out); break;
        case BF16: bf16_to_floats(row, columns, out); break;
        case F32: memcpy(out, row, (size_t)columns * sizeof(float)); break;
        case Q4_K: unpack_q4_k(row, columns, out); break;
        case Q5_K: unpack_q5_k(row, columns, out); break;
        case Q6_K: unpack_q6_k(row, columns, out); break;
        case IQ4_NL: case IQ4_XS: case MXFP4: case NVFP4: unpack_codebook(format, row, columns, out); break;
        default: unpack_chunked(format, row, columns, out);
    }
}

/* As unpack_row_plain, each float rounded to bfloat16; unpacked in pieces of a multiple of every block. */
static void unpack_row_plain_bf16(int format, const uint8_t *row, int64_t columns, float scale, uint16_t *out) {
    enum { PIECE = 1024 };
    float values[PIECE];
    for (int64_t j = 0; j < columns; j += PIECE) {
        const int64_t n = columns - j < PIECE ? columns - j : PIECE;
        unpack_row_plain(format, row + row_bytes(format, j), n, scale, values);
        floats_to_bf16(values, n, out + j);
    }
}

#endif
