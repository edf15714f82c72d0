/* y = x W^T for some rows of x, as when several texts decode together, in float32: a lane for each row of x.
 *
 *     y[t][r] = sum over k of x[t][k] w[r][k]        lanes: t
 *
 * Panels (gemm.h) have rows of W in the lanes, which must be transposed for it: worth it where they meet many rows of x. Here
 * it is x that is transposed, which is small, and W is unpacked as it stands. A tile is 6 rows of W (AVX-512: 8) by two
 * vectors of x: its sums stay in registers while k goes by, each number of W is broadcast once. A number of W that was
 * unpacked meets up to 32 rows of x.
 *
 * This reads few bytes for its work, so that memory is free for what comes next (`Ahead`): a line of it every few numbers.
 *
 * The order of each sum is that of k, whatever the number of rows: as that of panels.
 */

#ifndef QGRAFT_GEMM_LANES_H
#define QGRAFT_GEMM_LANES_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "level.h"
#include "unpack_vec.h"
#include "vec.h"

/* Rows of W in a tile, columns of W that are unpacked at a time; rows of W, and of x, of which sums are kept; how many
 * numbers go by for a line that is fetched. */
#if defined(__AVX512BW__)
enum { LANE_ROWS = 8, LANE_DEPTH = 128, LANE_BLOCK = 384, LINE_EVERY = 2 };
#else
enum { LANE_ROWS = 6, LANE_DEPTH = 256, LANE_BLOCK = 192, LINE_EVERY = 4 };
#endif

enum { LANE_TOKENS = 32, FEWEST_LANES = 9 }; /* fewer rows of x fill the tiles of gemv.h better */

typedef struct {
    _Alignas(64) float x[LANE_DEPTH * LANE_TOKENS]; /* x[k * width + t] */
    _Alignas(64) float y[LANE_BLOCK * LANE_TOKENS]; /* y[r * width + t] */
    _Alignas(64) float w[LANE_ROWS * LANE_DEPTH];
    int64_t width;                                  /* rows of x, a multiple of the lanes */
    const Ahead *ahead;
    int64_t run, at; /* how far it is fetched */
} Lanes;

enum { LINE = 64 };

/* Where the next lines to fetch begin, up to the end of their run; NULL for none. */
ALWAYS_INLINE const char *next_lines(Lanes *lanes, int64_t lines) {
    if (!lanes->ahead || lanes->run == lanes->ahead->count) return NULL;
    const Bytes *run = lanes->ahead->runs + lanes->run;
    const char *from = (const char *)run->from + lanes->at;
    lanes->at += lines * LINE;
    if (lanes->at >= run->bytes) lanes->run++, lanes->at = 0;
    return from;
}

/* `depth` columns of n rows of x, to the lanes; lanes beyond n hold the last row again. */
ALWAYS_INLINE void lanes_of_x(const float *x, int64_t stride, int64_t n, int64_t depth, Lanes *lanes) {
    for (int64_t t = 0; t < lanes->width; t += LANES)
        for (int64_t k = 0; k < depth; k += LANES) {
            vfloat rows[LANES];
            for (int i = 0; i < LANES; i++) rows[i] = v_load(x + smaller(t + i, n - 1) * stride + k);
            v_transpose(rows);
            for (int i = 0; i < LANES; i++) v_store(lanes->x + (k + i) * lanes->width + t, rows[i]);
        }
}

/* Chunks c0 <= c < c1, of the same 256 weights, of the rows from r on; those beyond the last are the last one again. */
ALWAYS_INLINE void unpack_lane_rows(const int format, const Product *p, int64_t r, int64_t c0, int64_t c1, Lanes *lanes) {
    const int64_t bytes = row_bytes(format, 256) / 8; /* of a chunk */
    const int k = (int)(c0 % 8);
    for (int i = 0; i < LANE_ROWS; i++) {
        const int64_t at = smaller(r + i, p->last - 1);
        const uint8_t *row = p->data + at * p->stride;
        const float scale = p->scales ? p->scales[at] : 1.0f;
        float k_scales[K_SCALES], *to = lanes->w + i * LANE_DEPTH;
        if (is_k_quant(format)) read_k_scales(format, row + row_bytes(format, c0 / 8 * 256), k, k + (int)(c1 - c0), k_scales);
        for (int64_t c = c0; c < c1; c++, to += 32) {
            vfloat w[PARTS];
            weights32(format, row, c, scale, k_scales, w);
            for (int v = 0; v < PARTS; v++) v_store(to + LANES * v, w[v]);
        }
        const uint8_t *later = row + 2 * LANE_ROWS * p->stride + c0 * bytes;
        for (int64_t j = 0; j < (c1 - c0) * bytes; j += LINE) __builtin_prefetch(later + j);
    }
}

/* The sums of a tile, of `V` vectors of rows of x from t on, `fresh` or added to. */
ALWAYS_INLINE void lanes_tile(const int V, Lanes *lanes, int64_t t, int64_t depth, int fresh, float *y) {
    const float *x = lanes->x + t, *w = lanes->w;
    const char *lines = next_lines(lanes, depth / LINE_EVERY), *from = lines ? lines : (const char *)w;
    const int64_t step = lines ? LINE : 0;
    vfloat sums[LANE_ROWS][2];
    y += t;
#pragma GCC unroll 8
    for (int r = 0; r < LANE_ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sums[r][v] = fresh ? v_zero() : v_load(y + r * lanes->width + LANES * v);
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k++, x += lanes->width) {
        vfloat values[2];
        if (k % LINE_EVERY == 0) __builtin_prefetch(from, 0, 2), from += step;
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) values[v] = v_load(x + LANES * v);
#pragma GCC unroll 8
        for (int r = 0; r < LANE_ROWS; r++) {
            const vfloat weight = v_set(w[r * LANE_DEPTH + k]);
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) sums[r][v] = v_fma(weight, values[v], sums[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < LANE_ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) v_store(y + r * lanes->width + LANES * v, sums[r][v]);
}

/* Sums of `rows` rows of W -> y[t][r]. */
ALWAYS_INLINE void lanes_to_y(const Lanes *lanes, int64_t rows, int64_t n, float *y, int64_t stride) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t t = 0; t < n; t += LANES) {
            vfloat tile[LANES];
            for (int i = 0; i < LANES; i++) tile[i] = v_load(lanes->y + smaller(r + i, rows - 1) * lanes->width + t);
            v_transpose(tile);
            for (int64_t i = 0; i < LANES && t + i < n; i++) {
                float *to = y + (t + i) * stride + r;
                if (r + LANES <= rows) v_store(to, tile[i]);
                else
                    for (int64_t j = 0; j < rows - r; j++) to[j] = tile[i][j];
            }
        }
}

ALWAYS_INLINE void lanes_block(const int format, const Product *p, const float *x, int64_t n, int64_t r0, int64_t r1,
                               Lanes *lanes) {
    const int64_t chunks = p->columns / 32;
    lanes->width = round_up(n, LANES);
    if (!chunks) memset(lanes->y, 0, (size_t)((r1 - r0) * lanes->width) * sizeof(float));
    for (int64_t c = 0; c < chunks; c += LANE_DEPTH / 32) {
        const int64_t c1 = smaller(c + LANE_DEPTH / 32, chunks), depth = 32 * (c1 - c);
        lanes_of_x(x + 32 * c, p->columns, n, depth, lanes);
        for (int64_t r = r0; r < r1; r += LANE_ROWS) {
            float *y = lanes->y + (r - r0) * lanes->width;
            unpack_lane_rows(format, p, r, c, c1, lanes);
            for (int64_t t = 0; t < lanes->width; t += 2 * LANES) {
                if (t + LANES < lanes->width) lanes_tile(2, lanes, t, depth, c == 0, y);
                else lanes_tile(1, lanes, t, depth, c == 0, y);
            }
        }
    }
}

/* As gemv; the columns after the last whole chunk are left to it. */
static void gemm_lanes(const Product *p, const float *x) {
    Lanes lanes;
    lanes.ahead = p->ahead, lanes.run = lanes.at = 0;
    for (int64_t t = 0; t < p->m; t += LANE_TOKENS)
        for (int64_t r = p->first; r < p->last; r += LANE_BLOCK) {
            const int64_t n = smaller(LANE_TOKENS, p->m - t), r1 = smaller(r + LANE_BLOCK, p->last);
#define BLOCK_OF(FORMAT) lanes_block(FORMAT, p, x + t * p->columns, n, r, r1, &lanes)
            FOR_FORMAT(p->format, BLOCK_OF)
#undef BLOCK_OF
            lanes_to_y(&lanes, r1 - r, n, p->y + t * p->rows + r, p->rows);
        }
}

#endif
