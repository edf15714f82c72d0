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

/* The same with x as its codes stand for: what the vector levels sum as integers (gemm_int8.h). */
static void gemm_int8_plain(const Product *p, const QuantizedX *x) {
    enum { PIECE = 1024 };
    float w[PIECE];
    for (int64_t r = p->first; r < p->last; r++)
        for (int64_t start = 0; start < p->columns; start += PIECE) {
            const int64_t n = smaller(PIECE, p->columns - start);
            const uint8_t *packed = p->data + r * p->stride + row_bytes(p->format, start);
            unpack_row_plain(p->format, packed, n, p->scales ? p->scales[r] : 1.0f, w);
            for (int64_t i = 0; i < p->m; i++) {
                const int64_t at = i * x->groups + start / 32;
                float sum = 0.0f, *y = p->y + i * p->rows + r;
                for (int64_t g = 0; 32 * g < n; g++) {
                    const int8_t *codes = x->codes + 32 * (at + g);
                    float part = 0.0f;
                    for (int j = 0; j < smaller(32, n - 32 * g); j++) part += w[32 * g + j] * (float)codes[place_of(p->format, j)];
                    sum += x->steps[at + g] * part;
                }
                *y = start ? *y + sum : sum;
            }
        }
}

const Level qgraft_plain = {
    .name = "plain", .unpack_row = unpack_row_plain, .unpack_row_bf16 = unpack_row_plain_bf16, .gemv = gemv_plain,
    .quantize_x = quantize_x, .gemm_int8 = gemm_int8_plain, .pointwise = &pointwise, .decoding = &decoding,
    .attention = &varlen_attention, .descend = descend,
};
