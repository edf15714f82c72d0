/* Packed weights as numbers, and their products in 8-bit integers. Products in floating point are in linear.c.
 *
 *   qgraft_dequantize       packed rows -> float32 rows; the caller multiplies panels of rows with sgemm
 *   qgraft_dequantize_bf16  packed rows -> bfloat16 rows, likewise
 *   qgraft_linear_int8      y [m, rows] = x [m, columns] W^T in 8-bit integers, for the formats of `has_int8`
 *
 * As every .c file without "level" in its name, this one checks formats and shares rows out to threads; the loops are those
 * of the level (level.h).
 */

#include <stdlib.h>

#include "common.h"
#include "formats.h"
#include "level.h"

enum { PARALLEL_WEIGHTS = 65536 }; /* fewer are done before a second thread has woken up */

/* data [rows, row_bytes], scales [rows] (row-wise formats, else NULL) -> out [rows, columns]. 0, or -1 for a bad format. */
int qgraft_dequantize(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns, float *out,
                      int threads) {
    const int64_t stride = row_bytes(format, columns);
    const Level *level = qgraft_level();
    if (stride < 0) return -1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * columns > PARALLEL_WEIGHTS)
    for (int64_t r = 0; r < rows; r++)
        level->unpack_row(format, data + r * stride, columns, scales ? scales[r] : 1.0f, out + r * columns);
    return 0;
}

/* As qgraft_dequantize, each float32 value rounded to bfloat16. */
int qgraft_dequantize_bf16(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns,
                           uint16_t *out, int threads) {
    const int64_t stride = row_bytes(format, columns);
    const Level *level = qgraft_level();
    if (stride < 0) return -1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * columns > PARALLEL_WEIGHTS)
    for (int64_t r = 0; r < rows; r++)
        level->unpack_row_bf16(format, data + r * stride, columns, scales ? scales[r] : 1.0f, out + r * columns);
    return 0;
}

/* x [m, columns], data [rows, row_bytes] -> y [m, rows], with x rounded to 8 bits (quantize_x.h). 0, -1 for a bad format,
 * -2 without memory for the codes of x. */
int qgraft_linear_int8(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns,
                       const float *x, int64_t m, float *y, int threads) {
    enum { SHARE = 32 };
    const Product whole = {format, data, scales, row_bytes(format, columns), rows, columns, 0, rows, m, y};
    const int64_t groups = (columns + 63) / 64 * 2;
    const Level *level = qgraft_level();
    if (!has_int8(format)) return -1;
    if (m == 0) return 0;
    float *steps = malloc((size_t)(m * groups) * (2 * sizeof(float) + 32));
    if (!steps) return -2;
    const QuantizedX codes = {(int8_t *)(steps + 2 * m * groups), steps, steps + m * groups, groups};
    if (threads < 2 || m * rows * columns <= PARALLEL_WEIGHTS) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i++) level->quantize_x(format, x + i * columns, columns, i, &codes);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += SHARE) {
            Product part = whole;
            part.first = r, part.last = smaller(r + SHARE, rows);
            level->gemm_int8(&part, &codes);
        }
    }
    free(steps);
    return 0;
}
