/* y = x W^T and gx = g W for many rows of x or g: panels of packed weights are unpacked into the first-level cache and
 * multiplied there.
 *
 *     out[t][n] = sum over k of in[t][k] panel[k][n]      forward: k columns of W, n rows;   backward: k rows, n columns
 *
 * Tiles of 6 rows of `in` pass over a panel (panels.h): their sums, 6 by 16 (AVX-512: 6 by 64), stay in registers while k goes
 * by, and each number of `in` is broadcast once for all of the tile's n. The order of each sum is that of k, whatever the
 * number of tokens and threads. Tiles at an edge compute their last token again instead of having code of their own.
 *
 * AVX2 first copies the numbers of `in` that panels of the same k meet: rows that are far apart cost it a miss in two levels of
 * caches and in that of addresses, and where they are a power of two apart they drive one another out.
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
#include "panels.h"
#include "unpack.h"
#include "vec.h"

#if defined(__AVX512BF16__)
#define MULTIPLY_PAIRS v_fma_pairs
#else /* never called */
#define MULTIPLY_PAIRS v_fma
#endif

enum { TOKENS = 6 };

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
#pragma GCC unroll 4
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

/* All tokens over one panel, of whose n the first `width` are wanted. */
ALWAYS_INLINE void gemm_panel(const int kind, const int width, const float *panel, int64_t depth, int fresh,
                              const Tokens *tokens) {
    for (int64_t t = 0; t < tokens->m; t += TOKENS)
        gemm_tile(kind, TOKENS, width / LANES, panel, WIDTH, depth, fresh, tokens, t);
}

#if defined(__AVX512BW__)
enum { COPIES = 1 };
ALWAYS_INLINE Tokens copy_in(Tokens tokens, int64_t depth, float *copies) {
    (void)depth, (void)copies;
    return tokens;
}
#else
enum { COPIES = BLOCK_TOKENS * DEPTH };
/* The tokens with their `depth` numbers close together. */
ALWAYS_INLINE Tokens copy_in(Tokens tokens, int64_t depth, float *copies) {
    for (int64_t t = 0; t < tokens.m; t++)
        memcpy(copies + t * DEPTH, tokens.in + t * tokens.in_stride, (size_t)depth * sizeof(float));
    return (Tokens){copies, tokens.out, DEPTH, tokens.out_stride, tokens.m};
}
#endif

/* As gemv, for one block. What fills no panel is left to gemv. `in` is x, or its pairs. */
ALWAYS_INLINE void gemm_kind(const int kind, const Product *p, const float *x, const float *in) {
    _Alignas(64) float panel[DEPTH * WIDTH], copies[COPIES];
    const int64_t per = 1 + kind, chunks = p->columns / 32, stride = (p->columns + kind) / per;
    const int64_t last = chunks ? p->last - (p->last - p->first) % 64 : p->first;
    Product rest = *p;
    rest.first = last;
    if (last < p->last) gemv(&rest, x);
    if (last == p->first) return;
    for (int64_t c = 0; c < chunks; c += DEPTH / 32) {
        const int64_t c1 = smaller(c + DEPTH / 32, chunks), depth = 32 / per * (c1 - c);
        const Tokens rows = {in + 32 / per * c, p->y + p->first, stride, p->rows, p->m};
        Tokens tokens = copy_in(rows, depth, copies);
        for (int64_t r = p->first; r < last; r += WIDTH, tokens.out += WIDTH) {
#define PACK(FORMAT) pack_columns(FORMAT, kind, p, r, c, c1, panel)
            FOR_FORMAT(p->format, PACK)
#undef PACK
            gemm_panel(kind, WIDTH, panel, depth, c == 0, &tokens);
        }
    }
    if (p->columns % 32)
        for (int64_t r = p->first; r < last; r++) gemv_rest(p, x, r);
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

/* One panel of the gradient: `width` columns from `chunk` on, as pack_rows has them. */
ALWAYS_INLINE void grad_panel(const int kind, const int width, const int half, const Product *p, int64_t chunk, int64_t r0,
                              int64_t r1, const Tokens *tokens) {
    _Alignas(64) float panel[DEPTH * WIDTH];
#define PACK(FORMAT) pack_rows(FORMAT, kind, width, half, p, chunk, r0, r1, panel)
    FOR_FORMAT(p->format, PACK)
#undef PACK
    gemm_panel(kind, width, panel, (r1 - r0 + kind) / (1 + kind), r0 == 0, tokens);
}

/* gx [m, columns] (p->y) = g [m, rows] W, in the columns p->first <= j < p->last, for one block. */
ALWAYS_INLINE void grad_input_kind(const int kind, const Product *p, const float *g, const float *in) {
    _Alignas(64) float copies[COPIES];
    const int64_t per = 1 + kind, stride = (p->rows + kind) / per, last = p->last / 32 * 32;
    for (int64_t r = 0; r < p->rows && p->first < last; r += DEPTH) {
        const int64_t r1 = smaller(r + DEPTH, p->rows);
        const Tokens rows = {in + r / per, p->y + p->first, stride, p->columns, p->m};
        Tokens tokens = copy_in(rows, (r1 - r + kind) / per, copies);
        for (int64_t j = p->first; j < last; j += WIDTH, tokens.out += WIDTH) {
            if (WIDTH < 32 && j % 32) grad_panel(kind, 16, 1, p, j / 32, r, r1, &tokens);
            else if (j + WIDTH <= last) grad_panel(kind, WIDTH, 0, p, j / 32, r, r1, &tokens);
            else grad_panel(kind, 32, 0, p, j / 32, r, r1, &tokens);
        }
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
