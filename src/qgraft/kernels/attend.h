/* What a decoding step computes beside products with packed weights and what pointwise.h has, all in float32: attention of
 * one head, and the narrow products of a LoRA. Plain loops, which the compiler vectorizes for its level.
 */

#ifndef QGRAFT_ATTEND_H
#define QGRAFT_ATTEND_H

#include "native.h"

static float dot(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
    return sum;
}

/* a b + c, rounded once where the level has an instruction for it. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FUSED(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif

/* exp(x) for x <= 0, to 2 units in the last place; 0 below -87. x = k ln 2 + f with |f| <= ln 2 / 2, and a polynomial of
 * f. expf would be a call for each number, as it is never vectorized without libmvec. A NaN stays one. */
ALWAYS_INLINE float exp_negative(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    const float clamped = x < -87.0f ? -87.0f : x;
    const float k = FUSED(clamped, 1.44269504f, magic) - magic;
    const float f = FUSED(k, 2.12194440e-4f, FUSED(k, -0.693359375f, clamped));
    float p = 1.0f / 5040;
    p = FUSED(p, f, 1.0f / 720), p = FUSED(p, f, 1.0f / 120), p = FUSED(p, f, 1.0f / 24), p = FUSED(p, f, 1.0f / 6);
    p = FUSED(p, f, 0.5f), p = FUSED(p, f, 1.0f), p = FUSED(p, f, 1.0f);
    const float shifted = k + (magic + 127.0f); /* k + 127 stands in its lowest bits */
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits <<= 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

/* Four rows of K or V at once: q, or the sums, then pass through the registers a quarter as often. */
static void dot4(const float *q, const float *rows, int64_t channels, float scale, float *scores) {
    const float *b = rows + channels, *c = b + channels, *d = c + channels;
    float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
    fetch_ahead(rows, 4 * channels * (int64_t)sizeof(float));
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < channels; j++) s0 += q[j] * rows[j], s1 += q[j] * b[j], s2 += q[j] * c[j], s3 += q[j] * d[j];
    scores[0] = scale * s0, scores[1] = scale * s1, scores[2] = scale * s2, scores[3] = scale * s3;
}

static void add4(const float *shares, const float *rows, int64_t channels, float *out) {
    const float *b = rows + channels, *c = b + channels, *d = c + channels;
    fetch_ahead(rows, 4 * channels * (int64_t)sizeof(float));
    const float s0 = shares[0], s1 = shares[1], s2 = shares[2], s3 = shares[3];
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) out[j] += (s0 * rows[j] + s1 * b[j]) + (s2 * c[j] + s3 * d[j]);
}

/* out [channels] = softmax(scale q K^T) V over `past` keys and values [past, channels] and the newest, which other threads
 * may be about to write behind them; scores [past + 1]: scratch. */
static void attend(const float *q, const float *keys, const float *values, int64_t past, const float *newest_key,
                   const float *newest_value, int64_t channels, float scale, float *scores, float *out) {
    const int64_t fours = past / 4 * 4;
    scores[past] = scale * dot(q, newest_key, channels);
    float largest = scores[past], sum = 0.0f;
    for (int64_t t = 0; t < fours; t += 4) dot4(q, keys + t * channels, channels, scale, scores + t);
    for (int64_t t = fours; t < past; t++) scores[t] = scale * dot(q, keys + t * channels, channels);
    for (int64_t t = 0; t < past; t++) largest = scores[t] > largest ? scores[t] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t <= past; t++) {
        scores[t] = exp_negative(scores[t] - largest);
        sum += scores[t];
    }
    for (int64_t j = 0; j < channels; j++) out[j] = scores[past] * newest_value[j];
    for (int64_t t = 0; t < fours; t += 4) add4(scores + t, values + t * channels, channels, out);
    for (int64_t t = fours; t < past; t++)
        for (int64_t j = 0; j < channels; j++) out[j] += scores[t] * values[t * channels + j];
    for (int64_t j = 0; j < channels; j++) out[j] /= sum;
}

static const Vectors vectors = {dot, attend};

#endif
