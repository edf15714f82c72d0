/* Float32 arithmetic that several loops share. Plain loops, which the compiler vectorizes for its level. */

#ifndef QGRAFT_VECTOR_MATH_H
#define QGRAFT_VECTOR_MATH_H

#include <stdint.h>
#include <string.h>

#include "common.h"

static inline float dot(const float *a, const float *b, int64_t n) {
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

#endif
