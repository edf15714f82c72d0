/* Native CPU kernels: C, OpenMP, no Python and no torch headers. What Python calls, through ctypes.
 *
 *   qgraft_dequantize       packed rows -> float32 rows; the caller multiplies panels of rows with sgemm
 *   qgraft_dequantize_bf16  packed rows -> bfloat16 rows, likewise
 *   qgraft_linear_int8      y [m, rows] = x [m, columns] W^T in 8-bit integers, for the formats of `has_int8`
 *   qgraft_cpu_level        which build of the functions runs, for people
 *
 * linear.c has qgraft_linear: products with packed weights in floating point, forward and backward, with LoRAs; pointwise.c
 * what a training step computes beside them; decode.c qgraft_decode_step: one token through a whole decoder.
 *
 * This file checks formats, shares rows out to threads and picks the level; the loops are in the headers (native.h).
 * The environment variable QGRAFT_CPU (base, v3, v4, v4-vnni) takes a lower level than the CPU has, for tests and comparisons.
 */

#include <stdlib.h>

#include "native.h"

enum { PARALLEL_WEIGHTS = 65536 }; /* fewer are done before a second thread has woken up */

#if HAVE_X86_LEVELS
static const Level *best_v4(const char *wanted) {
    if (!__builtin_cpu_supports("avx512vnni")) return &qgraft_v4;
#if HAVE_BF16_LEVEL
    if (__builtin_cpu_supports("avx512bf16") && strcmp(wanted, "v4-vnni")) return &qgraft_v4_bf16;
#endif
    return &qgraft_v4_vnni;
}
#endif

static const Level *choose_level(void) {
    const char *wanted = getenv("QGRAFT_CPU");
    wanted = wanted ? wanted : "";
    if (!strcmp(wanted, "base")) return &qgraft_base;
#if HAVE_X86_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4") && strcmp(wanted, "v3"))
        return strcmp(wanted, "v4") ? best_v4(wanted) : &qgraft_v4;
    if (__builtin_cpu_supports("x86-64-v3")) return &qgraft_v3;
#endif
    return &qgraft_base;
}

static const Level *level(void) {
    static const Level *chosen;
    if (!chosen) chosen = choose_level(); /* two threads at once choose the same */
    return chosen;
}

const Level *qgraft_level(void) { return level(); }

const char *qgraft_cpu_level(void) { return level()->name; }

/* data [rows, row_bytes], scales [rows] (row-wise formats, else NULL) -> out [rows, columns]. 0, or -1 for a bad format. */
int qgraft_dequantize(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns, float *out,
                      int threads) {
    const int64_t stride = row_bytes(format, columns);
    const Level *use = level();
    if (stride < 0) return -1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * columns > PARALLEL_WEIGHTS)
    for (int64_t r = 0; r < rows; r++)
        use->unpack_row(format, data + r * stride, columns, scales ? scales[r] : 1.0f, out + r * columns);
    return 0;
}

/* As qgraft_dequantize, each float32 value rounded to bfloat16. */
int qgraft_dequantize_bf16(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns,
                           uint16_t *out, int threads) {
    const int64_t stride = row_bytes(format, columns);
    const Level *use = level();
    if (stride < 0) return -1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * columns > PARALLEL_WEIGHTS)
    for (int64_t r = 0; r < rows; r++)
        use->unpack_row_bf16(format, data + r * stride, columns, scales ? scales[r] : 1.0f, out + r * columns);
    return 0;
}

/* x [m, columns], data [rows, row_bytes] -> y [m, rows], with x rounded to 8 bits (activations.h). 0, -1 for a bad format, -2: no memory for its codes. */
int qgraft_linear_int8(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns,
                       const float *x, int64_t m, float *y, int threads) {
    enum { SHARE = 32 };
    const Product whole = {format, data, scales, row_bytes(format, columns), rows, columns, 0, rows, m, y};
    const int64_t groups = (columns + 63) / 64 * 2;
    const Level *use = level();
    if (!has_int8(format)) return -1;
    if (m == 0) return 0;
    float *steps = malloc((size_t)(m * groups) * (2 * sizeof(float) + 32));
    if (!steps) return -2;
    const Activations codes = {(int8_t *)(steps + 2 * m * groups), steps, steps + m * groups, groups};
    if (threads < 2 || m * rows * columns <= PARALLEL_WEIGHTS) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i++) use->quantize(format, x + i * columns, columns, i, &codes);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += SHARE) {
            Product part = whole;
            part.first = r, part.last = r + SHARE < rows ? r + SHARE : rows;
            use->int8(&part, &codes);
        }
    }
    free(steps);
    return 0;
}
