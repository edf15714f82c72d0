/* Half-precision numbers as floats, and floats as bfloat16, in plain C that compilers vectorize. */

#ifndef QGRAFT_FLOATS_H
#define QGRAFT_FLOATS_H

#include <stdint.h>
#include <string.h>

#include "common.h"

/* IEEE half -> float, all values: subnormals, infinities, NaN. Without a hardware half type, and without branches, so
 * that the loop over a row of halves is vectorized. */
ALWAYS_INLINE float half_to_float(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    const uint32_t magnitude = h & 0x7fff;
    const uint32_t rebias = 112u << 23 << (magnitude >= 0x7c00); /* infinities and NaN keep all exponent bits */
    const uint32_t normal = (magnitude << 13) + rebias;
    const float tiny = (float)(int32_t)magnitude * 0x1p-24f; /* a subnormal, exactly */
    uint32_t subnormal;
    memcpy(&subnormal, &tiny, 4);
    const uint32_t is_normal = 0u - (magnitude >= 0x0400);
    const uint32_t bits = (normal & is_normal) | (subnormal & ~is_normal) | (uint32_t)(h & 0x8000) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* The scale of mxfp4: 2^(e - 128), the two smallest of them subnormal. */
ALWAYS_INLINE float e8m0_to_float(uint8_t e) {
    const uint32_t bits = e < 2 ? 0x200000u << e : (uint32_t)(e - 1) << 23;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Half of the scale of nvfp4: 4 bits of exponent less 7, 3 of mantissa, no sign; the largest one is 0 where NaN would be. */
ALWAYS_INLINE float e4m3_to_float(uint8_t e) {
    const uint32_t exponent = e >> 3 & 15, mantissa = e & 7;
    const uint32_t bits = (exponent + 119) << 23 | mantissa << 20;
    float f;
    memcpy(&f, &bits, 4);
    if (exponent == 0) f = (float)(int)mantissa * 0x1p-10f;
    return e == 127 ? 0.0f : f;
}

/* n bfloat16 numbers, the upper halves of floats -> floats. */
static inline void bf16_to_floats(const uint8_t *p, int64_t n, float *out) {
    for (int64_t j = 0; j < n; j++) {
        uint16_t h;
        memcpy(&h, p + 2 * j, 2);
        const uint32_t bits = (uint32_t)h << 16;
        memcpy(out + j, &bits, 4);
    }
}

/* Round to nearest, ties to even, as torch does; NaN stays NaN. */
static inline void floats_to_bf16(const float *values, int64_t n, uint16_t *out) {
    for (int64_t j = 0; j < n; j++) {
        uint32_t bits;
        memcpy(&bits, values + j, 4);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const uint32_t quiet = bits >> 16 | 0x40;
        out[j] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
    }
}

#endif
