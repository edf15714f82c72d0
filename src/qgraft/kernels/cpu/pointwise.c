/* What pointwise.py calls: the loops of pointwise.h over whole tensors, shared out to threads. All tensors are contiguous
 * float32, but for those said to have strides or to hold bfloat16 numbers.
 */

#include <stdint.h>

#include "level.h"

enum {
    PARALLEL_NUMBERS = 32768, /* fewer are done before a second thread has woken up */
    PIECE = 1024,             /* numbers that stay in the first-level cache between two loops */
};

#define EACH_ROW \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * width > PARALLEL_NUMBERS)")

/* x [rows, width], weight [width] -> y [rows, width], r [rows]. */
void qgraft_norm(const float *x, const float *weight, float epsilon, int64_t rows, int64_t width, float *y, float *r,
                 int threads) {
    const Pointwise *loops = qgraft_level()->pointwise;
    EACH_ROW for (int64_t i = 0; i < rows; i++) r[i] = loops->norm(x + i * width, weight, epsilon, width, y + i * width);
}

/* y of qgraft_norm again, bit for bit. */
void qgraft_normalized(const float *x, const float *weight, const float *r, int64_t rows, int64_t width, float *y,
                       int threads) {
    const Pointwise *loops = qgraft_level()->pointwise;
    EACH_ROW for (int64_t i = 0; i < rows; i++) loops->normalized(x + i * width, weight, r[i], width, y + i * width);
}

/* g = dL/dy -> gx = dL/dx. */
void qgraft_norm_backward(const float *g, const float *x, const float *weight, const float *r, int64_t rows, int64_t width,
                          float *gx, int threads) {
    const Pointwise *loops = qgraft_level()->pointwise;
    EACH_ROW for (int64_t i = 0; i < rows; i++)
        loops->norm_backward(g + i * width, x + i * width, weight, r[i], width, gx + i * width);
}

/* Numbers first to first + n of a tensor: where they are, or widened to `scratch`. */
static const float *floats(const Pointwise *loops, const void *from, int halves, int64_t first, int64_t n, float *scratch) {
    if (!halves) return (const float *)from + first;
    loops->from_bf16((const uint8_t *)from + 2 * first, n, scratch);
    return scratch;
}

/* gate, up [n], in bfloat16 where `halves` -> h [n] and, unless these are NULL, gate and up rounded to bfloat16. */
void qgraft_gated(int activation, const void *gate, const void *up, int halves, int64_t n, float *h, uint16_t *gate_rounded,
                  uint16_t *up_rounded, int threads) {
    const Pointwise *loops = qgraft_level()->pointwise;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n > PARALLEL_NUMBERS)
    for (int64_t i = 0; i < n; i += PIECE) {
        float widened[2][PIECE];
        const int64_t count = n - i < PIECE ? n - i : PIECE;
        const float *x = floats(loops, gate, halves, i, count, widened[0]);
        const float *u = floats(loops, up, halves, i, count, widened[1]);
        loops->gated(activation, x, u, count, h + i);
        if (gate_rounded) loops->to_bf16(x, count, gate_rounded + i), loops->to_bf16(u, count, up_rounded + i);
    }
}

/* g = dL/dh -> dL/dgate, dL/dup, all [n]. */
void qgraft_gated_backward(int activation, const float *g, const void *gate, const void *up, int halves, int64_t n,
                           float *g_gate, float *g_up, int threads) {
    const Pointwise *loops = qgraft_level()->pointwise;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n > PARALLEL_NUMBERS)
    for (int64_t i = 0; i < n; i += PIECE) {
        float widened[2][PIECE];
        const int64_t count = n - i < PIECE ? n - i : PIECE;
        const float *x = floats(loops, gate, halves, i, count, widened[0]);
        const float *u = floats(loops, up, halves, i, count, widened[1]);
        loops->gated_backward(activation, g + i, x, u, count, g_gate + i, g_up + i);
    }
}

/* q [heads, tokens, channels], k [groups, tokens, channels] with strides of heads and of tokens; cos, sin [tokens, width]
 * -> q_out [tokens, heads, channels], k_out [tokens, groups, channels]; gradients where `backward`. */
void qgraft_rotate(int backward, const float *q, int64_t q_head, int64_t q_token, int64_t heads, const float *k,
                   int64_t k_head, int64_t k_token, int64_t groups, const float *cos, const float *sin, int64_t width, int64_t tokens,
                   int64_t channels, float *q_out, float *k_out, int threads) {
    const Pointwise *loops = qgraft_level()->pointwise;
    const int many = tokens * (heads + groups) * channels > PARALLEL_NUMBERS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && many)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t * width, *s = sin + t * width;
        loops->rotate(backward, q + t * q_token, q_head, heads, c, s, width / 2, channels, q_out + t * heads * channels);
        loops->rotate(backward, k + t * k_token, k_head, groups, c, s, width / 2, channels, k_out + t * groups * channels);
    }
}
