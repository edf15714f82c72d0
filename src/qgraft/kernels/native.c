/* Native CPU kernels: C, OpenMP, no Python and no torch headers. What Python calls, through ctypes.
 *
 *   qgraft_dequantize       packed rows -> float32 rows; the caller multiplies panels of rows with sgemm
 *   qgraft_dequantize_bf16  packed rows -> bfloat16 rows, likewise
 *   qgraft_linear_int8      y [m, rows] = x [m, columns] W^T in 8-bit integers, for the formats of `has_int8`
 *   qgraft_level_name       the levels that this CPU has;  qgraft_use_level: the one to run
 *   qgraft_sources          the hash of the sources that this library was made from (abi.py)
 *
 * linear.c has qgraft_linear: products with packed weights in floating point, forward and backward, with LoRAs; pointwise.c
 * what a training step computes beside them; decode.c qgraft_decode_step: one token through a whole decoder.
 *
 * This file checks formats, shares rows out to threads and holds the level; the loops are in the headers (native.h).
 */

#include <stdatomic.h>
#include <stdlib.h>

#include "native.h"

#ifndef QGRAFT_SOURCES
#error "built without the hash of its sources, which setup.py gives"
#endif

enum { PARALLEL_WEIGHTS = 65536 }; /* fewer are done before a second thread has woken up */
enum { LEVELS = 5 };

const char *qgraft_sources(void) { return QGRAFT_SOURCES; }

/* Whether the compiler made levels of vectors. */
int qgraft_has_vectors(void) { return HAVE_X86_LEVELS; }

#if HAVE_X86_LEVELS
/* What gcc may use for x86-64-v3 and v4; gcc 11 does not know these names here. */
#define HAS __builtin_cpu_supports
static int has_v3(void) {
    return HAS("avx2") && HAS("fma") && HAS("f16c") && HAS("bmi") && HAS("bmi2") && HAS("lzcnt") && HAS("movbe");
}

static int has_v4(void) {
    return HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") && HAS("avx512vl");
}
#endif

/* The levels that this CPU has, plainest first; how many. */
static int levels_here(const Level *here[LEVELS]) {
    int count = 0;
    here[count++] = &qgraft_base;
#if HAVE_X86_LEVELS
    __builtin_cpu_init();
    if (!has_v3()) return count;
    here[count++] = &qgraft_v3;
    if (!has_v4()) return count;
    here[count++] = &qgraft_v4;
    if (!HAS("avx512vnni")) return count;
    here[count++] = &qgraft_v4_vnni;
    if (HAS("avx512bf16")) here[count++] = &qgraft_v4_bf16;
#endif
    return count;
}

static _Atomic(const Level *) chosen; /* NULL: the best one, which two threads at once find alike */

const Level *qgraft_level(void) {
    const Level *use = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (!use) {
        const Level *here[LEVELS];
        use = here[levels_here(here) - 1];
        atomic_store_explicit(&chosen, use, memory_order_relaxed);
    }
    return use;
}

/* The name of the level at `index` of those that this CPU has, plainest first; NULL beyond the last. */
const char *qgraft_level_name(int index) {
    const Level *here[LEVELS];
    return index >= 0 && index < levels_here(here) ? here[index]->name : NULL;
}

/* Take the level at `index` from now on; no function may be running. 0, or -1 where there is none. */
int qgraft_use_level(int index) {
    const Level *here[LEVELS];
    if (index < 0 || index >= levels_here(here)) return -1;
    atomic_store_explicit(&chosen, here[index], memory_order_relaxed);
    return 0;
}

/* data [rows, row_bytes], scales [rows] (row-wise formats, else NULL) -> out [rows, columns]. 0, or -1 for a bad format. */
int qgraft_dequantize(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns, float *out,
                      int threads) {
    const int64_t stride = row_bytes(format, columns);
    const Level *use = qgraft_level();
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
    const Level *use = qgraft_level();
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
    const Level *use = qgraft_level();
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
