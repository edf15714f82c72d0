/* y = x W^T for a few rows of x, in float32: packed weights go to registers and are multiplied there.
 *
 * One row of x alone may have a way of its own (gemv_codes.h), and so may more than 8 (gemm_lanes.h).
 *
 * A tile is R rows of W by T rows of x. Its R * T sums stay in registers while it goes along the columns: 32 weights of
 * each of the R rows are unpacked (weights32) and multiplied with all T rows of x, so a packed byte is read once for
 * every T rows of x and a vector of x once for R rows of W. Tiles at an edge compute their last row again instead of
 * having code of their own; sums of surplus rows are dropped.
 */

#ifndef QGRAFT_GEMV_H
#define QGRAFT_GEMV_H

#include <stdint.h>

#include "common.h"
#include "formats.h"
#include "gemm_lanes.h"
#include "gemv_codes.h"
#include "level.h"
#include "unpack.h"
#include "unpack_vec.h"
#include "vec.h"

/* Sums of the rows r0 to r0 + R - 1 of W and i0 to i0 + T - 1 of x. */
ALWAYS_INLINE void gemv_tile(const int format, const int R, const int T, const Product *p, const float *x, int64_t r0,
                             int64_t i0) {
    const int64_t columns = p->columns, chunks = columns / 32;
    const uint8_t *row[4];
    const float *xs[8];
    float scale[4], k_scales[4][K_SCALES];
    vfloat sums[24]; /* of row r and token t: r * T + t */
    for (int r = 0; r < R; r++) {
        const int64_t at = r0 + r < p->last ? r0 + r : p->last - 1;
        row[r] = p->data + at * p->stride;
        scale[r] = p->scales ? p->scales[at] : 1.0f;
    }
    for (int t = 0; t < T; t++) xs[t] = x + (i0 + t < p->m ? i0 + t : p->m - 1) * columns;
#pragma GCC unroll 24
    for (int k = 0; k < R * T; k++) sums[k] = v_zero();
    for (int64_t c = 0; c < chunks; c++) {
        vfloat w[4][PARTS];
        const int64_t bytes = R * row_bytes(format, 256) / 8; /* of a chunk */
        if (T <= 2) prefetch(row[0] + c * bytes, bytes); /* more rows of x take longer than reading */
        if (is_k_quant(format) && c % 8 == 0)
            for (int r = 0; r < R; r++) read_k_scales(format, row[r] + row_bytes(format, c * 32), 0, 8, k_scales[r]);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            if (T <= 2) _mm_prefetch((const char *)row[r] + row_bytes(format, 32) * c + PREFETCH_DISTANCE, _MM_HINT_T0);
            weights32(format, row[r], c, scale[r], k_scales[r], w[r]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; i++)
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const vfloat value = v_load(xs[t] + 32 * c + LANES * i);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums[r * T + t] = v_fma(w[r][i], value, sums[r * T + t]);
            }
    }
    float totals[24];
#pragma GCC unroll 6
    for (int k = 0; k < R * T; k += 4)
        _mm_storeu_ps(totals + k, v_sum4(sums[k], sums[k + 1], sums[k + 2], sums[k + 3]));
    for (int r = 0; r < R && r0 + r < p->last; r++)
        for (int t = 0; t < T && i0 + t < p->m; t++) p->y[(i0 + t) * p->rows + r0 + r] = totals[r * T + t];
}

/* The columns after the last whole chunk, which only formats without blocks have. */
static void gemv_rest(const Product *p, const float *x, int64_t r) {
    const int64_t whole = p->columns / 32 * 32, rest = p->columns - whole;
    float w[32];
    unpack_row_plain(p->format, p->data + r * p->stride + row_bytes(p->format, whole), rest,
                     p->scales ? p->scales[r] : 1.0f, w);
    for (int64_t i = 0; i < p->m; i++) {
        float sum = p->y[i * p->rows + r];
        for (int64_t j = 0; j < rest; j++) sum += w[j] * x[i * p->columns + whole + j];
        p->y[i * p->rows + r] = sum;
    }
}

#define TILES(NAME)                                                              \
    static void NAME(const Product *p, const float *x, int64_t r0, int64_t i0) { \
        FOR_FORMAT(p->format, NAME##_TILE)                                       \
    }
#define gemv_tile_1_TILE(FORMAT) gemv_tile(FORMAT, ROWS_1, 1, p, x, r0, i0)
#define gemv_tile_2_TILE(FORMAT) gemv_tile(FORMAT, ROWS_2, 2, p, x, r0, i0)
#define gemv_tile_4_TILE(FORMAT) gemv_tile(FORMAT, ROWS_4, 4, p, x, r0, i0)
#define gemv_tile_8_TILE(FORMAT) gemv_tile(FORMAT, ROWS_8, 8, p, x, r0, i0)

/* Rows of W in a tile of 1, 2, 4 and 8 rows of x: what 32 vector registers hold, or 16. */
#if defined(__AVX512BW__)
enum { ROWS_1 = 4, ROWS_2 = 4, ROWS_4 = 4, ROWS_8 = 3 };
#else
enum { ROWS_1 = 4, ROWS_2 = 2, ROWS_4 = 1, ROWS_8 = 1 };
#endif

TILES(gemv_tile_1)
TILES(gemv_tile_2)
TILES(gemv_tile_4)
TILES(gemv_tile_8)

/* Rows of x go by in blocks that stay in the first-level cache while all rows of W pass. */
static void gemv(const Product *p, const float *x) {
    enum { BLOCK = 16 };
    const int by_codes = multiplies_codes(p), by_lanes = p->m >= FEWEST_LANES;
    if (by_codes) gemv_codes(p, x);
    if (by_lanes) gemm_lanes(p, x);
    for (int64_t i = 0; i < p->m && !by_codes && !by_lanes; i += BLOCK) {
        const int64_t n = p->m - i < BLOCK ? p->m - i : BLOCK;
        const int64_t step = n <= 1 ? ROWS_1 : n <= 2 ? ROWS_2 : n <= 4 ? ROWS_4 : ROWS_8;
        for (int64_t r = p->first; r < p->last; r += step) {
            if (n <= 1) gemv_tile_1(p, x, r, i);
            else if (n <= 2) gemv_tile_2(p, x, r, i);
            else if (n <= 4) gemv_tile_4(p, x, r, i);
            else
                for (int64_t k = i; k < i + n; k += 8) gemv_tile_8(p, x, r, k);
        }
    }
    if (p->columns % 32)
        for (int64_t r = p->first; r < p->last; r++) gemv_rest(p, x, r);
}

#endif
