/* Attention of one token, in the heads that share keys, over its own key and those of the tokens before it: what a decoding
 * step computes beside products with packed weights and what pointwise.h has; and what a LoRA adds there. All in float32.
 */

#ifndef QGRAFT_DECODE_ATTENTION_H
#define QGRAFT_DECODE_ATTENTION_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "level.h"
#include "vec.h"
#include "vector_math.h"

/* Four rows of K or V at once: q, or the sums, then pass through the registers a quarter as often. */
static void dot4(const float *q, const float *rows, int64_t channels, float scale, float *scores) {
    const float *b = rows + channels, *c = b + channels, *d = c + channels;
#if defined(__AVX2__)
    if (channels % LANES == 0) {
        vfloat sums[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
        for (int64_t j = 0; j < channels; j += LANES) {
            const vfloat value = v_load(q + j);
            for (int k = 0; k < 4; k++) sums[k] = v_fma(v_load(rows + k * channels + j), value, sums[k]);
        }
        _mm_storeu_ps(scores, _mm_mul_ps(v_sum4(sums[0], sums[1], sums[2], sums[3]), _mm_set1_ps(scale)));
        return;
    }
#endif
    float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < channels; j++) s0 += q[j] * rows[j], s1 += q[j] * b[j], s2 += q[j] * c[j], s3 += q[j] * d[j];
    scores[0] = scale * s0, scores[1] = scale * s1, scores[2] = scale * s2, scores[3] = scale * s3;
}

static void add4(const float *shares, const float *rows, int64_t channels, float *out) {
    const float *b = rows + channels, *c = b + channels, *d = c + channels;
    const float s0 = shares[0], s1 = shares[1], s2 = shares[2], s3 = shares[3];
#if defined(__AVX2__)
    if (channels % LANES == 0) {
        for (int64_t j = 0; j < channels; j += LANES) {
            const vfloat first = v_fma(v_set(s1), v_load(b + j), v_fma(v_set(s0), v_load(rows + j), v_load(out + j)));
            v_store(out + j, v_fma(v_set(s3), v_load(d + j), v_fma(v_set(s2), v_load(c + j), first)));
        }
        return;
    }
#endif
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) out[j] += (s0 * rows[j] + s1 * b[j]) + (s2 * c[j] + s3 * d[j]);
}

/* scores [heads, keys] of queries [heads, channels] with `count` keys from `at` on. */
static void score_keys(const float *q, int64_t heads, const float *keys, int64_t count, int64_t channels, float scale,
                       float *scores, int64_t stride) {
    const int64_t fours = count / 4 * 4;
    prefetch(keys, count * channels * (int64_t)sizeof(float));
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t t = 0; t < fours; t += 4)
            dot4(q + h * channels, keys + t * channels, channels, scale, scores + h * stride + t);
        for (int64_t t = fours; t < count; t++)
            scores[h * stride + t] = scale * dot(q + h * channels, keys + t * channels, channels);
    }
}

/* out [heads, channels] += shares [heads, keys] times values. */
static void add_values(const float *shares, int64_t heads, const float *values, int64_t count, int64_t channels, float *out,
                       int64_t stride) {
    const int64_t fours = count / 4 * 4;
    prefetch(values, count * channels * (int64_t)sizeof(float));
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t t = 0; t < fours; t += 4)
            add4(shares + h * stride + t, values + t * channels, channels, out + h * channels);
        for (int64_t t = fours; t < count; t++)
            for (int64_t j = 0; j < channels; j++) out[h * channels + j] += shares[h * stride + t] * values[t * channels + j];
    }
}

/* scores -> exp(score - the largest), the last one first: a NaN there is one everywhere; their sum, with that of a sink. */
static float exponentials(float *scores, int64_t n, float sink) {
    float largest = scores[n - 1], sum = 0.0f;
    for (int64_t t = 0; t < n; t++) largest = scores[t] > largest ? scores[t] : largest;
    largest = sink > largest ? sink : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < n; t++) {
        scores[t] = exp_negative(scores[t] - largest);
        sum += scores[t];
    }
    return sum + exp_negative(sink - largest);
}

/* out [heads, channels] = softmax(scale q K^T) V of queries that share keys and values. These are in `count` spans, (first slot,
 * how many) each; the last of the last span is the token's own. sinks [heads]: a score of each head that stands for nothing,
 * or NULL. scores [heads, keys]: scratch. Heads take turns after a few keys, which stay in the first-level cache meanwhile. */
static void decode_attention(const float *q, int64_t heads, const float *keys, const float *values, const int64_t *spans,
                             int64_t count, int64_t channels, float scale, const float *sinks, float *scores, float *out) {
    enum { KEYS = 32 };
    int64_t all = 0;
    for (int64_t i = 0; i < count; i++) all += spans[2 * i + 1];
    for (int64_t i = 0, at = 0; i < count; at += spans[2 * i + 1], i++)
        for (int64_t t = 0; t < spans[2 * i + 1]; t += KEYS)
            score_keys(q, heads, keys + (spans[2 * i] + t) * channels, smaller(KEYS, spans[2 * i + 1] - t), channels, scale,
                       scores + at + t, all);
    memset(out, 0, (size_t)(heads * channels) * sizeof(float));
    for (int64_t h = 0; h < heads; h++) {
        const float sum = exponentials(scores + h * all, all, sinks ? sinks[h] : -__builtin_inff());
        for (int64_t t = 0; t < all; t++) scores[h * all + t] /= sum;
    }
    for (int64_t i = 0, at = 0; i < count; at += spans[2 * i + 1], i++)
        for (int64_t t = 0; t < spans[2 * i + 1]; t += KEYS)
            add_values(scores + at + t, heads, values + (spans[2 * i] + t) * channels, smaller(KEYS, spans[2 * i + 1] - t),
                       channels, out, all);
}

#if defined(__AVX2__)

/* y[r] += rows[r] h for four rows; `rest`: which lanes there are of the last numbers, where these are not 8. */
ALWAYS_INLINE void add_four_rows(const float *rows, const float *h, int64_t rank, __m256i rest, float *y) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 8 <= rank; i += 8) {
        const __m256 value = _mm256_loadu_ps(h + i);
        for (int k = 0; k < 4; k++) sums[k] = _mm256_fmadd_ps(_mm256_loadu_ps(rows + k * rank + i), value, sums[k]);
    }
    if (i < rank) {
        const __m256 value = _mm256_maskload_ps(h + i, rest);
        for (int k = 0; k < 4; k++) sums[k] = _mm256_fmadd_ps(_mm256_maskload_ps(rows + k * rank + i, rest), value, sums[k]);
    }
    _mm_storeu_ps(y, _mm_add_ps(_mm_loadu_ps(y), sum4_of_eight(sums[0], sums[1], sums[2], sums[3])));
}

#endif

/* y[r] += rows[r] h for n rows [n, rank]: what the B of a LoRA adds. A call for each row would take longer than its sum. Ranks
 * are small: the vectors are of 8 floats with AVX-512, too. */
static void add_rows(const float *rows, const float *h, int64_t n, int64_t rank, float *y) {
    int64_t r = 0;
#if defined(__AVX2__)
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i rest = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(rank % 8)), lanes);
    if (rank == 8) /* as most have it: no loop */
        for (; r + 4 <= n; r += 4) add_four_rows(rows + r * 8, h, 8, rest, y + r);
    for (; r + 4 <= n; r += 4) add_four_rows(rows + r * rank, h, rank, rest, y + r);
#endif
    for (; r < n; r++) y[r] += dot(rows + r * rank, h, rank);
}

/* h = (clamp(up) + 1) g s(alpha g) with g = min(gate, limit) and s(z) = 1 / (1 + exp(-z)): gpt-oss's gate. */
static void clamped_gate(const float *gate, const float *up, float limit, float alpha, int64_t n, float *h) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const float g = gate[j] > limit ? limit : gate[j], below = up[j] > limit ? limit : up[j];
        const float u = below < -limit ? -limit : below, z = alpha * g, e = exp_negative(-__builtin_fabsf(z));
        h[j] = (z < 0.0f ? e : 1.0f) / (1.0f + e) * g * (u + 1.0f);
    }
}

static const Decoding decoding = {add_rows, decode_attention, clamped_gate};

#endif
