/* The kernels for any CPU, in plain C that the compiler vectorizes as far as the CPU family allows. */

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "decode_attention.h"
#include "descend.h"
#include "floats.h"
#include "formats.h"
#include "level.h"
#include "pointwise.h"
#include "quantize_x.h"
#include "unpack.h"
#include "varlen_attention.h"

/* Each packed row is unpacked in pieces that stay in the first-level cache, and multiplied with all rows of x. */
static void gemv_plain(const Product *p, const float *x) {
    enum { PIECE = 1024 };
    float w[PIECE];
    for (int64_t r = p->first; r < p->last; r++)
        for (int64_t start = 0; start < p->columns || start == 0; start += PIECE) {
            const int64_t n = p->columns - start < PIECE ? p->columns - start : PIECE;
            const uint8_t *packed = p->data + r * p->stride + row_bytes(p->format, start);
            unpack_row_plain(p->format, packed, n, p->scales ? p->scales[r] : 1.0f, w);
            for (int64_t i = 0; i < p->m; i++) {
                const float *values = x + i * p->columns + start;
                float sum = 0.0f, *y = p->y + i * p->rows + r;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < n; j++) sum += w[j] * values[j];
                *y = start ? *y + sum : sum;
            }
        }
}

/* Group g of a row: signed codes in the order of quantize_x.h, and d and m of w = d * code + m. */
static void read_group(const Product *p, int64_t r, int64_t g, int codes[32], float *d, float *m) {
    const int64_t bytes = row_bytes(p->format, 32), left = p->columns - 32 * g;
    const uint8_t *group = p->data + r * p->stride + g * bytes;
    uint8_t rest[32] = {0};
    *d = p->scales ? p->scales[r] : half_to_float(group);
    *m = p->format == Q4_1 ? half_to_float(group + 2) : 0.0f;
    if (left < 32) group = memcpy(rest, group, (size_t)row_bytes(p->format, left) % 32);
    const uint8_t *q = group + (p->format == Q4_1 ? 4 : p->scales ? 0 : 2);
    const int zero = p->format == Q4_0 ? 8 : 0, flip = p->format == ROW_INT4 ? 8 : 0;
    for (int j = 0; j < 32; j++) {
        const int code = p->format == Q8_0 || p->format == ROW_INT8 ? (int8_t)q[j] : j < 16 ? q[j] & 15 : q[j - 16] >> 4;
        codes[j] = (code ^ flip) - flip - zero;
    }
}

static void gemm_int8_plain(const Product *p, const QuantizedX *x) {
    for (int64_t r = p->first; r < p->last; r++)
        for (int64_t g = 0; 32 * g < p->columns; g++) {
            int codes[32];
            float d, m;
            read_group(p, r, g, codes, &d, &m);
            for (int64_t i = 0; i < p->m; i++) {
                const int64_t at = i * x->groups + g;
                const int8_t *values = x->codes + 32 * at;
                float *y = p->y + i * p->rows + r;
                int sum = 0;
                for (int j = 0; j < 32; j++) sum += codes[j] * values[j];
                const float part = d * x->steps[at] * (float)sum + m * x->sums[at];
                *y = g ? *y + part : part;
            }
        }
}

const Level qgraft_plain = {
    .name = "plain", .unpack_row = unpack_row_plain, .unpack_row_bf16 = unpack_row_plain_bf16, .gemv = gemv_plain,
    .quantize_x = quantize_x, .gemm_int8 = gemm_int8_plain, .pointwise = &pointwise, .decoding = &decoding,
    .attention = &varlen_attention, .descend = descend,
};
