/* Native CPU kernels: plain C, OpenMP, no Python and no torch headers.
 *
 * Two jobs, for the 32-element GGML blocks, the row-wise ChatGLM formats and 16-bit floats:
 *
 *   qgraft_dequantize    packed rows -> float32 rows, one row at a time; the caller multiplies panels of rows with sgemm
 *                        (qgraft_dequantize_bf16: -> bfloat16 rows)
 *   qgraft_linear_small  y[M, out] = x[M, in] * W^T for a few rows of x: each packed row is read once, unpacked into a
 *                        buffer that stays in the first-level cache, and multiplied with all M rows of x
 *
 * The bit layouts are those of formats/ggml.py and formats/rowwise.py; the Python tests compare every value with them.
 * Each row function is compiled three times (x86-64-v4, v3 and baseline) and picked by the CPU at load time, so one
 * build serves every machine. Loops are written so that the compiler vectorizes them; there are no intrinsics.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

enum { Q4_0 = 0, Q4_1 = 1, Q5_0 = 2, Q5_1 = 3, Q8_0 = 4, ROW_INT8 = 5, ROW_INT4 = 6, F16 = 7, BF16 = 8 };

/* IEEE half -> float, all values: subnormals, infinities, NaN. Without a hardware half type, and without branches, so
 * that the loop over a row of halves is vectorized. */
static inline float half_to_float(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    const uint32_t magnitude = h & 0x7fff;
    const uint32_t rebias = 112u << 23 << (magnitude >= 0x7c00); /* infinities and NaN keep all exponent bits */
    const uint32_t normal = (magnitude << 13) + rebias;
    const float tiny = (float)(int32_t)magnitude * 0x1p-24f; /* a subnormal, exactly */
    uint32_t subnormal;
    memcpy(&subnormal, &tiny, 4);
    const uint32_t is_normal = 0u - (magnitude >= 0x0400);
    const uint32_t bits = (normal & is_normal) | (subnormal & ~is_normal) | (uint32_t)(h & 0x8000) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* 18 bytes: half d, 16 bytes of nibbles (low: weights 0..15, high: 16..31). w = d * (q - 8) */
FOR_EACH_CPU static void row_q4_0(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 18, out += 32) {
        const float d = half_to_float(p);
        for (int j = 0; j < 16; j++) out[j] = d * (float)((int)(p[2 + j] & 15) - 8);
        for (int j = 0; j < 16; j++) out[16 + j] = d * (float)((int)(p[2 + j] >> 4) - 8);
    }
}

/* 20 bytes: half d, half m, 16 bytes of nibbles. w = d * q + m */
FOR_EACH_CPU static void row_q4_1(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 20, out += 32) {
        const float d = half_to_float(p), m = half_to_float(p + 2);
        for (int j = 0; j < 16; j++) out[j] = d * (float)(int)(p[4 + j] & 15) + m;
        for (int j = 0; j < 16; j++) out[16 + j] = d * (float)(int)(p[4 + j] >> 4) + m;
    }
}

/* 22 bytes: half d, 32 fifth bits, 16 bytes of nibbles. w = d * (q - 16) */
FOR_EACH_CPU static void row_q5_0(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 22, out += 32) {
        const float d = half_to_float(p);
        uint32_t high;
        memcpy(&high, p + 2, 4);
        for (int j = 0; j < 16; j++) {
            const int q = (p[6 + j] & 15) | (int)((high >> j & 1) << 4);
            out[j] = d * (float)(q - 16);
        }
        for (int j = 0; j < 16; j++) {
            const int q = (p[6 + j] >> 4) | (int)((high >> (j + 16) & 1) << 4);
            out[16 + j] = d * (float)(q - 16);
        }
    }
}

/* 24 bytes: half d, half m, 32 fifth bits, 16 bytes of nibbles. w = d * q + m */
FOR_EACH_CPU static void row_q5_1(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 24, out += 32) {
        const float d = half_to_float(p), m = half_to_float(p + 2);
        uint32_t high;
        memcpy(&high, p + 4, 4);
        for (int j = 0; j < 16; j++) {
            const int q = (p[8 + j] & 15) | (int)((high >> j & 1) << 4);
            out[j] = d * (float)q + m;
        }
        for (int j = 0; j < 16; j++) {
            const int q = (p[8 + j] >> 4) | (int)((high >> (j + 16) & 1) << 4);
            out[16 + j] = d * (float)q + m;
        }
    }
}

/* 34 bytes: half d, 32 signed bytes. w = d * q */
FOR_EACH_CPU static void row_q8_0(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t b = 0; b < columns / 32; b++, p += 34, out += 32) {
        const float d = half_to_float(p);
        const int8_t *q = (const int8_t *)(p + 2);
        for (int j = 0; j < 32; j++) out[j] = d * (float)q[j];
    }
}

/* one signed byte a weight, one scale a row */
FOR_EACH_CPU static void row_int8(const uint8_t *p, int64_t columns, float scale, float *out) {
    const int8_t *q = (const int8_t *)p;
    for (int64_t j = 0; j < columns; j++) out[j] = (float)q[j] * scale;
}

/* two signed nibbles a byte, high nibble = even column, one scale a row */
FOR_EACH_CPU static void row_int4(const uint8_t *p, int64_t columns, float scale, float *out) {
    for (int64_t j = 0; j < columns / 2; j++) {
        const int byte = (int8_t)p[j];
        const int low = (int8_t)(uint8_t)(p[j] << 4);
        out[2 * j] = (float)(byte >> 4) * scale;
        out[2 * j + 1] = (float)(low >> 4) * scale;
    }
}

/* IEEE half a weight */
FOR_EACH_CPU static void row_f16(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t j = 0; j < columns; j++) out[j] = half_to_float(p + 2 * j);
}

/* the upper half of a float a weight */
FOR_EACH_CPU static void row_bf16(const uint8_t *p, int64_t columns, float *out) {
    for (int64_t j = 0; j < columns; j++) {
        uint16_t h;
        memcpy(&h, p + 2 * j, 2);
        const uint32_t bits = (uint32_t)h << 16;
        memcpy(out + j, &bits, 4);
    }
}

static int64_t row_bytes(int format, int64_t columns) {
    switch (format) {
        case Q4_0: return columns / 32 * 18;
        case Q4_1: return columns / 32 * 20;
        case Q5_0: return columns / 32 * 22;
        case Q5_1: return columns / 32 * 24;
        case Q8_0: return columns / 32 * 34;
        case ROW_INT8: return columns;
        case ROW_INT4: return columns / 2;
        case F16: case BF16: return columns * 2;
    }
    return -1;
}

static void unpack_row(int format, const uint8_t *row, int64_t columns, float scale, float *out) {
    switch (format) {
        case Q4_0: row_q4_0(row, columns, out); break;
        case Q4_1: row_q4_1(row, columns, out); break;
        case Q5_0: row_q5_0(row, columns, out); break;
        case Q5_1: row_q5_1(row, columns, out); break;
        case Q8_0: row_q8_0(row, columns, out); break;
        case ROW_INT8: row_int8(row, columns, scale, out); break;
        case ROW_INT4: row_int4(row, columns, scale, out); break;
        case F16: row_f16(row, columns, out); break;
        case BF16: row_bf16(row, columns, out); break;
    }
}

FOR_EACH_CPU static float dot(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* data [rows, row_bytes], scales [rows] (row-wise formats, else NULL) -> out [rows, columns]. 0, or -1 for a bad format. */
int qgraft_dequantize(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns, float *out,
                      int threads) {
    const int64_t stride = row_bytes(format, columns);
    if (stride < 0) return -1;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns > 16384)
    for (int64_t r = 0; r < rows; r++)
        unpack_row(format, data + r * stride, columns, scales ? scales[r] : 1.0f, out + r * columns);
    return 0;
}

enum { CHUNK = 1024 }; /* columns unpacked at a time where a row is not needed whole: a multiple of every block */

/* Round to nearest, ties to even, as torch does; NaN stays NaN. */
FOR_EACH_CPU static void to_bf16(const float *values, int64_t n, uint16_t *out) {
    for (int64_t j = 0; j < n; j++) {
        uint32_t bits;
        memcpy(&bits, values + j, 4);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const uint32_t quiet = bits >> 16 | 0x40;
        out[j] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
    }
}

/* As qgraft_dequantize, each float32 value rounded to bfloat16. */
int qgraft_dequantize_bf16(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns,
                           uint16_t *out, int threads) {
    const int64_t stride = row_bytes(format, columns), step = row_bytes(format, CHUNK);
    if (stride < 0) return -1;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns > 16384)
    for (int64_t r = 0; r < rows; r++) {
        float values[CHUNK];
        const uint8_t *p = data + r * stride;
        for (int64_t j = 0; j < columns; j += CHUNK, p += step) {
            const int64_t n = columns - j < CHUNK ? columns - j : CHUNK;
            unpack_row(format, p, n, scales ? scales[r] : 1.0f, values);
            to_bf16(values, n, out + r * columns + j);
        }
    }
    return 0;
}

/* x [m, columns], data [rows, row_bytes] -> y [m, rows]. 0, -1 for a bad format, -2 when out of memory. */
int qgraft_linear_small(int format, const uint8_t *data, const float *scales, int64_t rows, int64_t columns,
                        const float *x, int64_t m, float *y, int threads) {
    const int64_t stride = row_bytes(format, columns);
    if (stride < 0) return -1;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (rows * columns > 16384)
    {
        float *w = malloc((size_t)columns * sizeof(float));
        if (!w) {
#pragma omp atomic write
            failed = -2;
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            if (!w) continue;
            unpack_row(format, data + r * stride, columns, scales ? scales[r] : 1.0f, w);
            for (int64_t i = 0; i < m; i++) y[i * rows + r] = dot(x + i * columns, w, columns);
        }
        free(w);
    }
    return failed;
}

/* Which copy of the row functions this CPU runs. */
const char *qgraft_cpu_level(void) {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
    if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
    return "x86-64 baseline (SSE2)";
#else
    return "one build for this CPU family";
#endif
}
