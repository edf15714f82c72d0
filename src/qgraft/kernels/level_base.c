/* The kernels for any CPU, in plain C that the compiler vectorizes as far as the CPU family allows. */

#include "native.h"
#include "rows.h"

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

const Level qgraft_base = {"plain C", plain_row, to_bf16, small};
