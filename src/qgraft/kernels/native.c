/* Native CPU kernels: C, OpenMP, no Python and no torch headers. What Python calls, through ctypes.
 *
 *   qgraft_dequantize       packed rows -> float32 rows; the caller multiplies panels of rows with sgemm
 *   qgraft_dequantize_bf16  packed rows -> bfloat16 rows, likewise
 *   qgraft_linear           y [m, rows] = x [m, columns] W^T, without unpacking to memory
 *   qgraft_grad_input       gx [m, columns] = g [m, rows] W, likewise
 *   qgraft_linear_int8      y = x W^T in 8-bit integers, for the formats of `has_int8`
 *   qgraft_batch_limit      up to how many rows of x they are faster than sgemm between unpacked panels
 *   qgraft_cpu_level        which build of the functions below runs, for people
 *
 * decode.c has one more, qgraft_decode_step: one token through a whole decoder.
 *
 * This file checks formats, shares rows out to threads and picks the level; the loops are in the headers (native.h).
 * The environment variable QGRAFT_CPU (base, v3, v4: without VNNI) takes a lower level than the CPU has, for tests and comparisons.
 */

#include <stdlib.h>

#include "native.h"

enum { PARALLEL_WEIGHTS = 65536 }; /* fewer are done before a second thread has woken up */

static const Level *choose_level(void) {
    const char *wanted = getenv("QGRAFT_CPU");
    wanted = wanted ? wanted : "";
    if (!strcmp(wanted, "base")) return &qgraft_base;
#if HAVE_X86_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4") && strcmp(wanted, "v3"))
        return __builtin_cpu_supports("avx512vnni") && strcmp(wanted, "v4") ? &qgraft_v4_vnni : &qgraft_v4;
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

/* Rows of x (of g, where `backward`) up to which the loops below beat unpacking panels for sgemm, as measured with torch's
 * (MKL). They win for any number of rows on AVX-512 CPUs of AMD, where MKL keeps to AVX2; elsewhere MKL is taken to do
 * better. */
int64_t qgraft_batch_limit(int backward) {
    if (level() == &qgraft_base) return backward ? 0 : 2;
#if HAVE_X86_LEVELS
    if (level() != &qgraft_v3 && __builtin_cpu_is("amd")) return INT64_MAX;
#endif
    return backward ? 0 : 16;
}

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

/* Runs a product in shares of `width` rows (backward: columns) by the tokens of one of `parts`. */
static void share_out(void (*run)(const Product *, const float *), const Product *whole, const float *in, int64_t in_width,
                      int64_t out_width, int64_t width, int threads) {
    enum { TOKENS = 96 }; /* a part has so many at least */
    const int64_t shares = (out_width + width - 1) / width, m = whole->m;
    const int64_t parts = m >= TOKENS * threads ? threads : 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t share = 0; share < shares * parts; share++) {
        const int64_t part = share % parts, t0 = m * part / parts, t1 = m * (part + 1) / parts;
        Product mine = *whole;
        mine.first = share / parts * width;
        mine.last = mine.first + width < out_width ? mine.first + width : out_width;
        mine.y += t0 * out_width, mine.m = t1 - t0;
        run(&mine, in + t0 * in_width);
    }
}

/* x [m, columns], data [rows, row_bytes] -> y [m, rows]. 0, or -1 for a bad format. */
int qgraft_linear(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns, const float *x,
                  int64_t m, float *y, int threads) {
    enum { MANY = 96, SHARE = 32, PANEL = 64 }; /* below that, unpacking a panel by columns costs more than it gains */
    const Product whole = {format, data, scales, row_bytes(format, columns), rows, columns, 0, rows, m, y};
    const Level *use = level();
    if (whole.stride < 0) return -1;
    if (m == 0) return 0;
    if (m >= MANY && use->forward) {
        share_out(use->forward, &whole, x, columns, rows, PANEL, m * rows * columns > PARALLEL_WEIGHTS ? threads : 1);
        return 0;
    }
    if (threads < 2 || rows * columns <= PARALLEL_WEIGHTS) {
        use->small(&whole, x);
        return 0;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r += SHARE) {
        Product part = whole;
        part.first = r, part.last = r + SHARE < rows ? r + SHARE : rows;
        use->small(&part, x);
    }
    return 0;
}

/* g [m, rows], data [rows, row_bytes] -> gx [m, columns]. 0, -1 for a bad format or a level without it (base). */
int qgraft_grad_input(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns, const float *g,
                      int64_t m, float *gx, int threads) {
    enum { PANEL = 64 };
    const Product whole = {format, data, scales, row_bytes(format, columns), rows, columns, 0, columns, m, gx};
    const Level *use = level();
    if (whole.stride < 0 || !use->backward) return -1;
    if (m == 0) return 0;
    share_out(use->backward, &whole, g, rows, columns, PANEL, m * rows * columns > PARALLEL_WEIGHTS ? threads : 1);
    return 0;
}

/* As qgraft_linear, with x rounded to 8 bits (activations.h). -2: no memory for its codes. */
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
