/* x rounded to 8 bits, for gemm_int8.h: each group of 32 neighbouring columns of a token has a step of its own.
 *
 *     step = max |x| / 127,  code = round(x * (127 / max |x|)), ties to even,  sum = step * (sum of the group's codes)
 *
 * One step for a whole token was not chosen: a few columns of a language model's activations are a hundred times larger
 * than the others, which would be left with one or two bits. Groups are those of the weights' blocks, so a group of the
 * product is one sum of integers and one float multiplication. A group below 2^-100 counts as zero; one with a NaN or an
 * infinity gets step and sum NaN, so that the whole output of its token is NaN and no wrong number looks right.
 */

#ifndef QGRAFT_QUANTIZE_X_H
#define QGRAFT_QUANTIZE_X_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "level.h"

/* Where column j of 32 goes, so that codes meet their weights' codes in the order in which gemm_int8.h takes these apart. */
ALWAYS_INLINE int code_place(int format, int j) { return format == ROW_INT4 ? (j % 2 ? j / 2 : 16 + j / 2) : j; }

static void quantize_group(int format, const float *x, int64_t n, int8_t *codes, float *step, float *sum) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float values[32] = {0};
    uint32_t largest = 0;
    memcpy(values, x, (size_t)n * sizeof(float));
    for (int j = 0; j < 32; j++) {
        uint32_t bits;
        memcpy(&bits, values + j, 4);
        bits &= 0x7fffffff; /* as integers, NaN > infinity > numbers */
        largest = bits > largest ? bits : largest;
    }
    float maximum, total = 0.0f;
    memcpy(&maximum, &largest, 4);
    memset(codes, 0, 32);
    if (largest >= 0x7f800000) {
        *step = *sum = maximum - maximum;
        return;
    }
    *step = maximum < 0x1p-100f ? 0.0f : maximum / 127.0f;
    const float inverse = maximum < 0x1p-100f ? 0.0f : 127.0f / maximum;
    for (int j = 0; j < 32; j++) values[j] = (values[j] * inverse + magic) - magic;
    for (int j = 0; j < 32; j++) total += values[j];
    for (int j = 0; j < 32; j++) codes[code_place(format, j)] = (int8_t)(int)values[j];
    *sum = *step * total;
}

static void quantize_x(int format, const float *x, int64_t columns, int64_t token, const QuantizedX *codes) {
    for (int64_t g = 0; g < codes->groups; g++) {
        const int64_t at = token * codes->groups + g, left = columns - 32 * g;
        const int64_t n = left < 0 ? 0 : left < 32 ? left : 32;
        quantize_group(format, x + 32 * g * (n > 0), n, codes->codes + 32 * at, codes->steps + at, codes->sums + at);
    }
}

#endif
