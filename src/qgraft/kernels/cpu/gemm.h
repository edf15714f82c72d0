/* y = x W^T and gx = g W for many rows of x or g: panels of packed weights are unpacked into the first-level cache and
 * multiplied there.
 *
 *     out[t][n] = sum over k of in[t][k] panel[k][n]      forward: k columns of W, n rows;   backward: k rows, n columns
 *
 * A panel is 128 by 64 weights. Tiles of 6 rows of `in` pass over it: their sums, 6 by 64 (AVX2: 6 by 16), stay in
 * registers while k goes by, and each number of `in` is broadcast once for all of the tile's n. The order of each sum is
 * that of k, whatever the number of tokens and threads. Tiles at an edge compute their last token again instead of
 * having code of their own.
 *
 * In bfloat16 (PAIRS) two numbers, of k and k + 1, take the place of one float: `in` and panel hold pairs, which one
 * instruction multiplies and adds to a float32 sum, so depth halves and nothing else changes.
 */

#ifndef QGRAFT_GEMM_H
#define QGRAFT_GEMM_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "gemv.h"
#include "level.h"
#include "unpack.h"
#include "unpack_vec.h"
#include "vec.h"

enum { DEPTH = 128, WIDTH = 64, TOKENS = 6, VECTORS = LANES == 16 ? 4 : 2 };
enum { FLOATS = 0, PAIRS = 1 };

#if defined(__AVX512BF16__)
#define BF16_PAIRS(low, high) v_bf16_pairs(low, high)
#define BF16_ROW(w) v_bf16(w[0], w[1])
#define MULTIPLY_PAIRS v_fma_pairs
#else /* never called */
#define BF16_PAIRS(low, high) low
#define BF16_ROW(w) w[0]
#define MULTIPLY_PAIRS v_fma
#endif

/* Columns from 32 * chunk on, `chunks` (1 or 2) times 32 of them, of rows r0 <= r < r1, to panel[(r - r0) * WIDTH];
 * PAIRS: of rows r and r + 1 to panel[(r - r0) / 2 * WIDTH], with zeros beyond the last. */
ALWAYS_INLINE void pack_rows(const int format, const int kind, const Product *p, int64_t chunk, int64_t chunks, int64_t r0,
                             int64_t r1, float *panel) {
    for (int64_t r = r0; r < r1; r += 1 + kind, panel += WIDTH) {
        const uint8_t *row = p->data + r * p->stride;
        const int64_t next = r + 1 < r1 ? p->stride : 0; /* PAIRS: to the second row */
        float k_scales[2][16];
        for (int i = 0; is_k_quant(format) && i <= kind; i++)
            read_k_scales(format, row + i * next + row_bytes(format, chunk / 8 * 256), k_scales[i]);
        for (int64_t c = chunk; c < chunk + chunks; c++) {
            vfloat w[PARTS], second[PARTS];
            weights32(format, row, c, p->scales ? p->scales[r] : 1.0f, k_scales[0], w);
            if (kind == PAIRS && next)
                weights32(format, row + next, c, p->scales ? p->scales[r + 1] : 1.0f, k_scales[1], second);
            for (int i = 0; i < PARTS; i++) {
                if (kind == PAIRS) w[i] = BF16_PAIRS(w[i], next ? second[i] : v_zero());
                v_store(panel + 32 * (c - chunk) + LANES * i, w[i]);
            }
        }
    }
}

/* Columns of the chunks c0 <= c < c1 (at most 4, of the same 8) of 64 rows from r0 on, to panel[column * WIDTH + r - r0];
 * PAIRS: of columns j and j + 1 to panel[j / 2 * WIDTH + r - r0]. */
ALWAYS_INLINE void pack_columns(const int format, const int kind, const Product *p, int64_t r0, int64_t c0, int64_t c1,
                                float *panel) {
    for (int64_t r = r0; r < r0 + WIDTH; r += LANES, panel += LANES) {
        float k_scales[LANES][16];
        for (int i = 0; is_k_quant(format) && i < LANES; i++)
            read_k_scales(format, p->data + (r + i) * p->stride + row_bytes(format, c0 / 8 * 256), k_scales[i]);
        for (int64_t c = c0; c < c1; c++) {
            float *to = panel + (c - c0) * (kind == PAIRS ? 16 : 32) * WIDTH;
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

typedef struct {
    const float *in; /* of token t at in + t * in_stride */
    float *out;
    int64_t in_stride, out_stride, m;
} Tokens;

/* out[t][n] += sum over 0 <= k < depth of in[t][k] panel[k][n], or = where fresh; t0 <= t < t0 + T, N vectors of n. */
ALWAYS_INLINE void gemm_tile(const int kind, const int T, const int N, const float *panel, int64_t stride, int64_t depth,
                             int fresh, const Tokens *tokens, int64_t t0) {
    const float *in[8];
    float *out[8];
    vfloat sums[8][VECTORS]; /* T by N of them */
    for (int t = 0; t < T; t++) {
        const int64_t at = t0 + t < tokens->m ? t0 + t : tokens->m - 1;
        in[t] = tokens->in + at * tokens->in_stride;
        out[t] = tokens->out + at * tokens->out_stride;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) sums[t][v] = fresh ? v_zero() : v_load(out[t] + LANES * v);
    for (int64_t k = 0; k < depth; k++, panel += stride) {
        vfloat w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) w[v] = v_load(panel + LANES * v);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const vfloat value = v_set(in[t][k]); /* or a pair: 32 bits are moved, whatever they mean */
#pragma GCC unroll 4
            for (int v = 0; v < N; v++)
                sums[t][v] = kind == PAIRS ? MULTIPLY_PAIRS(value, w[v], sums[t][v]) : v_fma(value, w[v], sums[t][v]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
        if (t0 + t < tokens->m)
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) v_store(out[t] + LANES * v, sums[t][v]);
}

/* All tokens over one panel of `width` (32 or 64) n. */
ALWAYS_INLINE void gemm_panel(const int kind, const float *panel, int64_t depth, int64_t width, int fresh, Tokens tokens) {
    const int64_t step = LANES * (width == WIDTH ? VECTORS : 2);
    for (int64_t n = 0; n < width; n += step, panel += step, tokens.out += step)
        for (int64_t t = 0; t < tokens.m; t += TOKENS) {
            if (width == WIDTH) gemm_tile(kind, TOKENS, VECTORS, panel, WIDTH, depth, fresh, &tokens, t);
            else gemm_tile(kind, TOKENS, 2, panel, WIDTH, depth, fresh, &tokens, t);
        }
}

/* As gemv, for many rows of x and 64 rows of W; what fills no panel is left to gemv. `in` is x, or its pairs. */
ALWAYS_INLINE void gemm_kind(const int kind, const Product *p, const float *x, const float *in) {
    _Alignas(64) float panel[DEPTH * WIDTH];
    const int64_t per = 1 + kind;
    if (p->last - p->first < WIDTH || p->columns < 32) {
        gemv(p, x);
        return;
    }
    for (int64_t c = 0; c < p->columns / 32; c += 4) {
        const int64_t c1 = c + 4 < p->columns / 32 ? c + 4 : p->columns / 32;
#define PACK(FORMAT) pack_columns(FORMAT, kind, p, p->first, c, c1, panel)
        FOR_FORMAT(p->format, PACK)
#undef PACK
        const int64_t stride = (p->columns + kind) / per;
        const Tokens tokens = {in + 32 / per * c, p->y + p->first, stride, p->rows, p->m};
        gemm_panel(kind, panel, 32 / per * (c1 - c), WIDTH, c == 0, tokens);
    }
    if (p->columns % 32)
        for (int64_t r = p->first; r < p->last; r++) gemv_rest(p, x, r);
}

/* The columns of gx after the last whole chunk, which only formats without blocks have. */
static void grad_input_rest(const Product *p, const float *g) {
    const int64_t whole = p->columns / 32 * 32, rest = p->columns - whole;
    float w[32];
    for (int64_t r = 0; r < p->rows; r++) {
        unpack_row_plain(p->format, p->data + r * p->stride + row_bytes(p->format, whole), rest,
                         p->scales ? p->scales[r] : 1.0f, w);
        for (int64_t t = 0; t < p->m; t++) {
            float *gx = p->y + t * p->columns + whole;
            for (int64_t j = 0; j < rest; j++) gx[j] = (r ? gx[j] : 0.0f) + g[t * p->rows + r] * w[j];
        }
    }
}

/* gx [m, columns] (p->y) = g [m, rows] W, in the columns p->first <= j < p->last, of which there are at most 64. */
ALWAYS_INLINE void grad_input_kind(const int kind, const Product *p, const float *g, const float *in) {
    _Alignas(64) float panel[DEPTH * WIDTH];
    const int64_t chunks = (p->last - p->first) / 32, per = 1 + kind;
    for (int64_t r = 0; r < p->rows && chunks > 0; r += DEPTH) {
        const int64_t r1 = r + DEPTH < p->rows ? r + DEPTH : p->rows;
#define PACK(FORMAT) pack_rows(FORMAT, kind, p, p->first / 32, chunks, r, r1, panel)
        FOR_FORMAT(p->format, PACK)
#undef PACK
        const int64_t stride = (p->rows + kind) / per;
        const Tokens tokens = {in + r / per, p->y + p->first, stride, p->columns, p->m};
        gemm_panel(kind, panel, (r1 - r + kind) / per, 32 * chunks, r == 0, tokens);
    }
    if (p->last == p->columns && p->columns % 32) grad_input_rest(p, g);
}

static void gemm(const Product *p, const float *x) { gemm_kind(FLOATS, p, x, x); }
static void gemm_grad_input(const Product *p, const float *g) { grad_input_kind(FLOATS, p, g, g); }

#if defined(__AVX512BF16__)

static void gemm_bf16(const Product *p, const float *x, const float *pairs) { gemm_kind(PAIRS, p, x, pairs); }
static void gemm_grad_input_bf16(const Product *p, const float *g, const float *pairs) {
    grad_input_kind(PAIRS, p, g, pairs);
}

/* n floats -> (n + 1) / 2 pairs of bfloat16 numbers, the last with a zero where n is odd. */
static void round_pairs(const float *values, int64_t n, float *pairs) {
    const int64_t whole = n / 32 * 32;
    for (int64_t j = 0; j < whole; j += 32)
        v_store(pairs + j / 2, v_bf16(v_load(values + j), v_load(values + j + LANES)));
    if (whole < n) {
        float rest[32] = {0};
        memcpy(rest, values + whole, (size_t)(n - whole) * sizeof(float));
        const vfloat last = v_bf16(v_load(rest), v_load(rest + LANES));
        memcpy(pairs + whole / 2, &last, (size_t)((n - whole + 1) / 2) * sizeof(float));
    }
}

#endif

#endif
