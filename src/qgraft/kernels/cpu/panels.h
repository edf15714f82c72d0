/* Panels: packed weights as floats, in the order in which products (gemm.h) pass over them.
 *
 *     forward    panel[k][n] = W[n][k]: rows of W become columns. AVX2 transposes codes, as bytes, AVX-512 floats
 *     backward   panel[k][n] = W[k][n]
 *
 * In bfloat16 (PAIRS) two numbers, of k and k + 1, take the place of one float.
 */

#ifndef QGRAFT_PANELS_H
#define QGRAFT_PANELS_H

#include <stdint.h>
#include <string.h>

#include "codes.h"
#include "common.h"
#include "formats.h"
#include "level.h"
#include "unpack_vec.h"
#include "vec.h"

/* A panel has DEPTH weights of each of WIDTH columns, VECTORS registers: it stays in the first-level cache while all rows of a
 * block's `in` pass. A block (linear.c shares them out) is what one thread multiplies at a time. From MANY
 * rows of x on panels are faster than gemv. */
#if defined(__AVX512BW__)
enum { DEPTH = 128, VECTORS = 4, BLOCK_COLUMNS = 64, BLOCK_TOKENS = INT32_MAX, MANY = 17 };
#else
enum { DEPTH = 256, VECTORS = 2, BLOCK_COLUMNS = 512, BLOCK_TOKENS = 192, MANY = 40 };
#endif
enum { WIDTH = VECTORS * LANES };
enum { FLOATS = 0, PAIRS = 1 };

#if defined(__AVX512BF16__)
#define BF16_PAIRS(low, high) v_bf16_pairs(low, high)
#define BF16_ROW(w) v_bf16(w[0], w[1])
#else /* never called */
#define BF16_PAIRS(low, high) low
#define BF16_ROW(w) w[0]
#endif

/* `width` columns (16: of half `half` of a chunk; 32, 64: whole chunks) from chunk number `chunk` on, of rows r0 <= r < r1, to
 * panel[(r - r0) * WIDTH]; PAIRS: of rows r and r + 1 to panel[(r - r0) / 2 * WIDTH], with zeros beyond the last. */
ALWAYS_INLINE void pack_rows(const int format, const int kind, const int width, const int half, const Product *p,
                             int64_t chunk, int64_t r0, int64_t r1, float *panel) {
    const int parts = (width < 32 ? width : 32) / LANES, from = half * PARTS / 2;
    for (int64_t r = r0; r < r1; r += 1 + kind, panel += WIDTH) {
        const uint8_t *row = p->data + r * p->stride;
        const int64_t next = r + 1 < r1 ? p->stride : 0; /* PAIRS: to the second row */
        float k_scales[2][K_SCALES];
#pragma GCC unroll 2
        for (int c = 0; c < (width + 31) / 32; c++) {
            vfloat w[PARTS], second[PARTS];
            for (int i = 0; is_k_quant(format) && i <= kind; i++)
                read_k_scales(format, row + i * next + row_bytes(format, chunk / 8 * 256), (int)((chunk + c) % 8),
                              (int)((chunk + c) % 8) + 1, k_scales[i]);
            weights32(format, row, chunk + c, p->scales ? p->scales[r] : 1.0f, k_scales[0], w);
            if (kind == PAIRS && next)
                weights32(format, row + next, chunk + c, p->scales ? p->scales[r + 1] : 1.0f, k_scales[1], second);
            for (int i = from; i < from + parts; i++) {
                if (kind == PAIRS) w[i] = BF16_PAIRS(w[i], next ? second[i] : v_zero());
                v_store(panel + 32 * c + LANES * (i - from), w[i]);
            }
        }
    }
}

#if !defined(__AVX512BW__)

/* 8 rows from r on; those beyond `last` are the last one again. */
typedef struct {
    const uint8_t *data[LANES];
    float scales[LANES], k_scales[LANES][K_SCALES];
} EightRows;

ALWAYS_INLINE EightRows eight_rows(const Product *p, int64_t r, int64_t last) {
    EightRows rows;
    for (int i = 0; i < LANES; i++) {
        const int64_t at = smaller(r + i, last - 1);
        rows.data[i] = p->data + at * p->stride;
        rows.scales[i] = p->scales ? p->scales[at] : 1.0f;
    }
    return rows;
}

/* Read what column_scales wants of the chunks first <= c < last, of the same 256 weights. */
ALWAYS_INLINE void read_scales_of_rows(const int format, EightRows *rows, int64_t first, int64_t last) {
    const int k = (int)(first % 8);
    for (int i = 0; is_k_quant(format) && i < LANES; i++)
        read_k_scales(format, rows->data[i] + row_bytes(format, first / 8 * 256), k, k + (int)(last - first), rows->k_scales[i]);
}

/* The scales of 8 rows in the lanes: d[1] of columns 16 to 31, m where the format has minimums. */
typedef struct {
    vfloat d[2], m;
} ColumnScales;

/* Half number `at` of block c of 8 rows. */
ALWAYS_INLINE vfloat halves_of_rows(const int format, const EightRows *rows, int64_t c, int at) {
    uint16_t h[LANES];
    for (int i = 0; i < LANES; i++) memcpy(h + i, rows->data[i] + row_bytes(format, 32 * c) + 2 * at, 2);
    return _mm256_cvtph_ps(_mm_setr_epi16((short)h[0], (short)h[1], (short)h[2], (short)h[3], (short)h[4],
                                         (short)h[5], (short)h[6], (short)h[7]));
}

/* The lane i of number k of k_scales[i]. */
ALWAYS_INLINE vfloat k_scales_of_rows(const EightRows *rows, int k) {
    const float(*s)[K_SCALES] = rows->k_scales;
    return _mm256_setr_ps(s[0][k], s[1][k], s[2][k], s[3][k], s[4][k], s[5][k], s[6][k], s[7][k]);
}

/* The scales of chunk c of a codebook, of its halves. */
ALWAYS_INLINE void codebook_scales(const int format, const EightRows *rows, int64_t c, vfloat d[2]) {
    _Alignas(32) float lanes[2][LANES];
    for (int i = 0; i < LANES; i++) {
        float both[2];
        codebook_chunk(format, rows->data[i], c, both);
        for (int h = 0; h < 2; h++) lanes[h][i] = both[h];
    }
    for (int h = 0; h < 2; h++) d[h] = v_load(lanes[h]);
}

ALWAYS_INLINE ColumnScales column_scales(const int format, const EightRows *rows, int64_t c) {
    const int k = (int)(c % 8);
    ColumnScales scales;
    scales.m = v_zero();
    if (is_codebook(format)) {
        codebook_scales(format, rows, c, scales.d);
        return scales;
    }
    if (format == ROW_INT8 || format == ROW_INT4) scales.d[0] = v_load(rows->scales);
    else if (is_k_quant(format)) scales.d[0] = k_scales_of_rows(rows, format == Q6_K ? 2 * k : k);
    else scales.d[0] = halves_of_rows(format, rows, c, 0);
    scales.d[1] = format == Q6_K ? k_scales_of_rows(rows, 2 * k + 1) : scales.d[0];
    if (format == Q4_K || format == Q5_K) scales.m = k_scales_of_rows(rows, 8 + k);
    else if (has_minimum(format)) scales.m = halves_of_rows(format, rows, c, 1);
    return scales;
}

/* The columns of chunk c of 8 rows, to panel[j * WIDTH]. Codes are transposed as bytes. */
ALWAYS_INLINE void pack_codes(const int format, const EightRows *rows, int64_t c, float *panel) {
    __m256i codes[LANES];
    uint8_t columns[32][8];
    for (int i = 0; i < LANES; i++) codes[i] = codes32(format, rows->data[i], c);
    transpose_bytes(codes, columns);
    const ColumnScales scales = column_scales(format, rows, c);
#pragma GCC unroll 32
    for (int j = 0; j < 32; j++) {
        const vfloat code = v_int(i_s8(columns[j])), d = scales.d[j / 16];
        v_store(panel + j * WIDTH, has_minimum(format) ? v_fma(code, d, scales.m) : v_mul(code, d));
    }
}

#endif

/* Columns of the chunks c0 <= c < c1, of the same 8, of WIDTH rows from r0 on, to panel[column * WIDTH + r - r0]; PAIRS: of columns
 * j and j + 1 to panel[j / 2 * WIDTH + r - r0]. */
ALWAYS_INLINE void pack_columns(const int format, const int kind, const Product *p, int64_t r0, int64_t c0, int64_t c1,
                                float *panel) {
    for (int64_t r = r0; r < r0 + WIDTH; r += LANES) {
#if !defined(__AVX512BW__)
        if (has_codes(format)) {
            EightRows rows = eight_rows(p, r, r + LANES);
            read_scales_of_rows(format, &rows, c0, c1);
            for (int64_t c = c0; c < c1; c++) pack_codes(format, &rows, c, panel + (c - c0) * 32 * WIDTH + r - r0);
            continue;
        }
#endif
        float k_scales[LANES][K_SCALES];
        for (int i = 0; is_k_quant(format) && i < LANES; i++)
            read_k_scales(format, p->data + (r + i) * p->stride + row_bytes(format, c0 / 8 * 256), 0, 8, k_scales[i]);
        for (int64_t c = c0; c < c1; c++) {
            float *to = panel + (c - c0) * (kind == PAIRS ? 16 : 32) * WIDTH + r - r0;
            vfloat w[PARTS][LANES];
            for (int i = 0; i < LANES; i++) {
                vfloat row[PARTS];
                weights32(format, p->data + (r + i) * p->stride, c, p->scales ? p->scales[r + i] : 1.0f, k_scales[i], row);
                if (kind == PAIRS) row[0] = BF16_ROW(row);
                for (int v = 0; v < PARTS; v++) w[v][i] = row[v];
            }
            for (int v = 0; v < (kind == PAIRS ? 1 : PARTS); v++) {
                v_transpose(w[v]);
                for (int j = 0; j < LANES; j++) v_store(to + (LANES * v + j) * WIDTH, w[v][j]);
            }
        }
    }
}

#endif
