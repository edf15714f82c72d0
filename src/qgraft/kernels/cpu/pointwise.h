/* What training and decoding compute beside products: norms, gated activations, rotations of queries and keys, forward and
 * backward. Formulas and their sources are in pointwise.py.
 *
 * Written with torch's operations each of them passes over memory three to ten times; here it is read once and written
 * once. Plain loops, which the compiler vectorizes for its level. A number's result does not depend on where it stands,
 * or on how many others there are.
 */

#ifndef QGRAFT_POINTWISE_H
#define QGRAFT_POINTWISE_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "floats.h"
#include "level.h"
#include "vector_math.h"

/* y = x r w of one row */
static void normalized(const float *x, const float *weight, float r, int64_t n, float *y) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) y[j] = x[j] * r * weight[j];
}

static float norm(const float *x, const float *weight, float epsilon, int64_t n, float *y) {
    const float r = 1.0f / __builtin_sqrtf(dot(x, x, n) / (float)n + epsilon);
    normalized(x, weight, r, n, y);
    return r;
}

/* gx = r (g w - x r^2 mean(g w x)) */
static void norm_backward(const float *g, const float *x, const float *weight, float r, int64_t n, float *gx) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += g[j] * weight[j] * x[j];
    const float share = sum / (float)n * (r * r * r);
#pragma omp simd
    for (int64_t j = 0; j < n; j++) gx[j] = g[j] * weight[j] * r - x[j] * share;
}

/* The activation of x is x s(x v(x)) with s(z) = 1 / (1 + exp(-z)): v = 1 for silu, and for gelu with tanh
 * v = sqrt(8 / pi) (1 + 0.044715 x^2), since (1 + tanh(z / 2)) / 2 = s(z). */
ALWAYS_INLINE float inner(const int activation, float x) {
    return activation == SILU ? x : x * (1.59576912f + 0.0713548163f * (x * x));
}

ALWAYS_INLINE void gate_forward(const int activation, const float *gate, const float *up, int64_t n, float *h) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const float x = gate[j], z = inner(activation, x), e = exp_negative(-__builtin_fabsf(z));
        h[j] = (z < 0.0f ? e : 1.0f) / (1.0f + e) * x * up[j];
    }
}

ALWAYS_INLINE void gate_backward(const int activation, const float *g, const float *gate, const float *up, int64_t n,
                                 float *g_gate, float *g_up) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const float x = gate[j], z = inner(activation, x), e = exp_negative(-__builtin_fabsf(z));
        const float large = 1.0f / (1.0f + e), small = e * large; /* s(|z|) and s(-|z|): s'(z) is their product */
        const float s = z < 0.0f ? small : large;
        const float slope = activation == SILU ? 1.0f : 1.59576912f + 0.214064449f * (x * x); /* of `inner` */
        g_up[j] = g[j] * (x * s);
        g_gate[j] = g[j] * up[j] * FUSED(x * slope, small * large, s);
    }
}

static void gated_piece(int activation, const float *gate, const float *up, int64_t n, float *h) {
    if (activation == SILU) gate_forward(SILU, gate, up, n, h);
    else gate_forward(GELU_TANH, gate, up, n, h);
}

static void gated_backward_piece(int activation, const float *g, const float *gate, const float *up, int64_t n,
                                 float *g_gate, float *g_up) {
    if (activation == SILU) gate_backward(SILU, g, gate, up, n, g_gate, g_up);
    else gate_backward(GELU_TANH, g, gate, up, n, g_gate, g_up);
}

/* One head of one token: each pair (x1, x2) = (x[j], x[j + half]) by its angle; what is behind 2 half is copied. */
ALWAYS_INLINE void rotate_head(const int backward, const float *x, const float *cos, const float *sin, int64_t half,
                               int64_t channels, float *out) {
    const float *x2 = x + half, *cos2 = cos + half, *sin2 = sin + half;
    float *out2 = out + half;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        const float a = x[j], b = x2[j];
        out[j] = backward ? a * cos[j] + b * sin2[j] : a * cos[j] - b * sin[j];
        out2[j] = backward ? b * cos2[j] - a * sin[j] : b * cos2[j] + a * sin2[j];
    }
    if (2 * half < channels && out != x) memcpy(out + 2 * half, x + 2 * half, (size_t)(channels - 2 * half) * sizeof(float));
}

static void rotate_token(int backward, const float *x, int64_t stride, int64_t heads, const float *cos, const float *sin,
                         int64_t half, int64_t channels, float *out) {
    for (int64_t h = 0; h < heads; h++, x += stride, out += channels) {
        if (backward) rotate_head(1, x, cos, sin, half, channels, out);
        else rotate_head(0, x, cos, sin, half, channels, out);
    }
}

static const Pointwise pointwise = {
    norm, normalized, norm_backward, gated_piece, gated_backward_piece, floats_to_bf16, bf16_to_floats,
    rotate_token,
};

#endif
