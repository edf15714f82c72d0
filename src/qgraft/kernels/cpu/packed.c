/* Packed weights as numbers. Their products are in linear.c.
 *
 *   qgraft_dequantize       packed rows -> float32 rows; the caller multiplies panels of rows with sgemm
 *   qgraft_dequantize_bf16  packed rows -> bfloat16 rows, likewise
 *
 * As every .c file without "level" in its name, this one checks formats and shares rows out to threads; the loops are those
 * of the level (level.h).
 */

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
