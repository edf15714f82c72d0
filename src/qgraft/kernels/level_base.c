/* The kernels for any CPU, in plain C that the compiler vectorizes as far as the CPU family allows. */

#include <stddef.h>

#include "native.h"
#include "activations.h"
#include "attend.h"
#include "rows.h"
#include "pointwise.h"
#include "samples.h"

/* Each packed row is unpacked in pieces that stay in the first-level cache, and multiplied with all rows of x. */
static void small(const Product *of, const float *x) {
    enum { PIECE = 1024 };
    float w[PIECE];
    for (int64_t r = of->first; r < of->last; r++)
        for (int64_t start = 0; start < of->columns || start == 0; start += PIECE) {
            const int64_t n = of->columns - start < PIECE ? of->columns - start : PIECE;
            const uint8_t *packed = of->data + r * of->stride + row_bytes(of->format, start);
            plain_row(of->format, packed, n, of->scales ? of->scales[r] : 1.0f, w);
            for (int64_t i = 0; i < of->m; i++) {
                const float *values = x + i * of->columns + start;
                float sum = 0.0f, *y = of->y + i * of->rows + r;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < n; j++) sum += w[j] * values[j];
                *y = start ? *y + sum : sum;
            }
        }
}

/* Group g of a row: signed codes in the order of code_place, and d and m of w = d * code + m. */
static void read_group(const Product *of, int64_t r, int64_t g, int codes[32], float *d, float *m) {
    const int64_t bytes = row_bytes(of->format, 32), left = of->columns - 32 * g;
    const uint8_t *p = of->data + r * of->stride + g * bytes;
    uint8_t rest[32] = {0};
    *d = of->scales ? of->scales[r] : half_to_float(p);
    *m = of->format == Q4_1 ? half_to_float(p + 2) : 0.0f;
    if (left < 32) p = memcpy(rest, p, (size_t)row_bytes(of->format, left) % 32);
    const uint8_t *q = p + (of->format == Q4_1 ? 4 : of->scales ? 0 : 2);
    const int zero = of->format == Q4_0 ? 8 : 0, flip = of->format == ROW_INT4 ? 8 : 0;
    for (int j = 0; j < 32; j++) {
        const int code = of->format == Q8_0 || of->format == ROW_INT8 ? (int8_t)q[j] : j < 16 ? q[j] & 15 : q[j - 16] >> 4;
        codes[j] = (code ^ flip) - flip - zero;
    }
}

static void int8_product(const Product *of, const Activations *x) {
    for (int64_t r = of->first; r < of->last; r++)
        for (int64_t g = 0; 32 * g < of->columns; g++) {
            int codes[32];
            float d, m;
            read_group(of, r, g, codes, &d, &m);
            for (int64_t i = 0; i < of->m; i++) {
                const int64_t at = i * x->groups + g;
                const int8_t *values = x->codes + 32 * at;
                float *y = of->y + i * of->rows + r;
                int sum = 0;
                for (int j = 0; j < 32; j++) sum += codes[j] * values[j];
                const float part = d * x->steps[at] * (float)sum + m * x->sums[at];
                *y = g ? *y + part : part;
            }
        }
}

const Level qgraft_base = {
    .name = "plain", .unpack_row = plain_row, .unpack_row_bf16 = plain_row_bf16, .small = small,
    .quantize = quantize_token, .int8 = int8_product, .vectors = &vectors,
    .pointwise = &pointwise, .attention = &attention,
};
