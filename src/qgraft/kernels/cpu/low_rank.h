/* What the LoRA of rank r adds to a product and its gradients: products in float32 with r rows or columns, for many rows
 * of x. Their arithmetic is a hundredth of the layer's, but they pass over y, g and x as it does.
 *
 *     add        out[t][n] += sum over i < r of in[t][i] factor[i][n]      y += h B^T, gx += gh A
 *     reduce     out[i][n]  = sum over t of in[i][t] x[t][n]               gA = gh^T x, gB^T = h^T g
 *
 * The order of each sum is that of i or t.
 */

#ifndef QGRAFT_LOW_RANK_H
#define QGRAFT_LOW_RANK_H

#include <stdint.h>

#include "gemm.h"
#include "level.h"
#include "vec.h"

/* in [m, rank]; factor [rank, width] with rows `factor_stride` apart; out [m, width]. */
static void add_low_rank(const float *in, int64_t m, int64_t rank, const float *factor, int64_t factor_stride, int64_t width,
                         float *out, int64_t out_stride) {
    enum { N = 2, STEP = N * LANES };
    const int64_t whole = width / STEP * STEP;
    for (int64_t n = 0; n < whole; n += STEP) {
        const Tokens tokens = {in, out + n, rank, out_stride, m};
        for (int64_t t = 0; t < m; t += TOKENS)
            gemm_tile(FLOATS, TOKENS, N, factor + n, factor_stride, rank, 0, &tokens, t);
    }
    for (int64_t t = 0; t < m && whole < width; t++)
        for (int64_t i = 0; i < rank; i++)
            for (int64_t n = whole; n < width; n++)
                out[t * out_stride + n] += in[t * rank + i] * factor[i * factor_stride + n];
}

/* in [rank, m]; x [m, width] with rows `stride` apart; out [rank, width] with rows `out_stride` apart. */
static void reduce_tokens(const float *in, int64_t m, int64_t rank, const float *x, int64_t stride, int64_t width, float *out,
                          int64_t out_stride) {
    enum { R = LANES == 16 ? 8 : 4, N = 2, STEP = N * LANES };
    const int64_t whole = width / STEP * STEP;
    for (int64_t n = 0; n < whole; n += STEP) {
        const Tokens rows = {in, out + n, m, out_stride, rank};
        for (int64_t i = 0; i < rank; i += R) gemm_tile(FLOATS, R, N, x + n, stride, m, 1, &rows, i);
    }
    for (int64_t i = 0; i < rank; i++)
        for (int64_t n = whole; n < width; n++) {
            float sum = 0.0f;
            for (int64_t t = 0; t < m; t++) sum += in[i * m + t] * x[t * stride + n];
            out[i * out_stride + n] = sum;
        }
}

static const LowRank low_rank = {add_low_rank, reduce_tokens};

#endif
