/* What the C files share: format numbers, the functions of one CPU level, half-precision numbers.
 *
 * One build serves every machine: it holds these levels, and one is chosen when the library is loaded (native.c).
 *
 *   level_base.c   plain          any CPU
 *   level_v3.c     avx2           x86-64-v3: AVX2, FMA, F16C
 *   level_v4.c     avx512         x86-64-v4; its 8-bit products are those of avx2
 *                  avx512-vnni    the same with VNNI: 8-bit products of its own
 *   level_bf16.c   avx512-bf16    the same with AVX512-BF16: products of bfloat16 numbers
 *
 * The vector levels are the same headers, compiled for the one CPU and the other: rows.h (bit layouts in plain C),
 * simd.h (bit layouts in vectors), small.h (float32 products with few rows of x), panels.h (with many, and gradients, in
 * bfloat16, too), low_rank.h (what a LoRA adds), activations.h and int8.h (products in 8 bits), attend.h (what decode.c
 * needs beside products), pointwise.h (what training does), samples.h
 * (attention of packed samples).
 */

#ifndef QGRAFT_NATIVE_H
#define QGRAFT_NATIVE_H

#include <stdint.h>
#include <string.h>

/* The levels of vectors need gcc 11, which can compile for x86-64-v3 and v4; clang has no `#pragma GCC target`. */
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define HAVE_X86_LEVELS 1
#else
#define HAVE_X86_LEVELS 0
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
    Q4_0 = 0, Q4_1 = 1, Q5_0 = 2, Q5_1 = 3, Q8_0 = 4, ROW_INT8 = 5, ROW_INT4 = 6, F16 = 7, BF16 = 8,
    Q4_K = 9, Q5_K = 10, Q6_K = 11,
    F32 = 12, /* for A and B of a LoRA */
};

/* Bytes that are fetched ahead of a row's where few tokens make memory the limit: several short rows at once are no
 * pattern that a CPU fetches by itself. Beyond the end of the data nothing is fetched, and nothing is wrong. */
enum { AHEAD = 8192 };

/* Rows first <= r < last of one product y [m, rows] = x [m, columns] W^T; y is written at y[i * rows + r]. */
typedef struct {
    int format;
    const uint8_t *data;
    const float *scales; /* [rows], NULL for formats without row scales */
    int64_t stride, rows, columns, first, last;
    int64_t m;
    float *y;
} Product;

/* x in 8 bits (activations.h): [m, groups] each, `groups` even; the columns after the last are codes 0 with step 0. */
typedef struct {
    int8_t *codes; /* 32 to a group */
    float *steps, *sums;
    int64_t groups;
} Activations;

/* Loops over float32 numbers (attend.h). */
typedef struct {
    float (*dot)(const float *a, const float *b, int64_t n);
    void (*attend)(const float *q, const float *keys, const float *values, int64_t past, const float *newest_key,
                   const float *newest_value, int64_t channels, float scale, float *scores, float *out);
} Vectors;

/* What a LoRA adds to products (low_rank.h). */
typedef struct {
    void (*add)(const float *in, int64_t m, int64_t rank, const float *low, int64_t low_stride, int64_t width, float *out,
                int64_t out_stride);
    void (*reduce)(const float *in, int64_t m, int64_t rank, const float *x, int64_t stride, int64_t width, float *out,
                   int64_t out_stride);
} LowRank;

enum { SILU = 0, GELU_TANH = 1 };

/* Loops over the numbers of an activation (pointwise.h): of one row, of one piece, of all heads of one token. Results may
 * stand where the inputs did. */
typedef struct {
    float (*norm)(const float *x, const float *weight, float epsilon, int64_t n, float *y);
    void (*normalized)(const float *x, const float *weight, float r, int64_t n, float *y);
    void (*norm_backward)(const float *g, const float *x, const float *weight, float r, int64_t n, float *gx);
    void (*gated)(int activation, const float *gate, const float *up, int64_t n, float *h);
    void (*gated_backward)(int activation, const float *g, const float *gate, const float *up, int64_t n, float *g_gate,
                           float *g_up);
    void (*to_bf16)(const float *values, int64_t n, uint16_t *out);
    void (*from_bf16)(const uint8_t *halves, int64_t n, float *out);
    void (*rotate)(int backward, const float *x, int64_t stride, int64_t heads, const float *cos, const float *sin,
                   int64_t half, int64_t channels, float *out);
} Pointwise;

/* Token t of head h is at data + t * token + h * head; its channels follow one another. */
typedef struct {
    const float *data;
    int64_t token, head;
} Strided;

/* Attention of samples that share a row of tokens (samples.h). As the structure of samples.py, field by field. */
typedef struct {
    Strided q, k, v, front_k, front_v;                       /* front: a prefix, in front of the keys of every sample */
    int64_t heads, groups, channels, tokens, samples, prefix, window; /* prefix, window: 0 for none */
    const int64_t *bounds, *contexts; /* [samples + 1], [samples] or NULL: tokens at the start that all of a sample see */
    double scale;
} Attention;

enum { ATTENTION_QUERIES = 24, ATTENTION_QUERIES_BACK = 48, ATTENTION_PANEL = 64 }; /* queries at a time; keys of a panel */

/* What samples.c shares out. `packed`: the keys and values of a group, in parts of `size` numbers. */
typedef struct {
    void (*pack)(const Attention *of, int64_t sample, int64_t group, int backward, float *packed, int64_t size);
    void (*forward)(const Attention *of, int64_t sample, int64_t head, const float *packed, int64_t size, float *scratch,
                    float *out, float *lse);
    void (*backward)(const Attention *of, int64_t sample, int64_t head, const float *packed, int64_t size, float *scratch,
                     const float *g, const float *out, const float *lse, float *gq, float *gk, float *gv);
} AttentionLoops;

typedef struct {
    const char *name;
    void (*unpack_row)(int format, const uint8_t *row, int64_t columns, float scale, float *out);
    void (*unpack_row_bf16)(int format, const uint8_t *row, int64_t columns, float scale, uint16_t *out);
    void (*small)(const Product *product, const float *x);
    void (*forward)(const Product *product, const float *x);  /* for many rows of x; NULL where there is none */
    void (*backward)(const Product *product, const float *g);
    /* The same with x and W (g and W) rounded to bfloat16: `pairs` [m, columns (rows) / 2, rounded up], two in each. */
    void (*forward_bf16)(const Product *product, const float *x, const float *pairs);
    void (*backward_bf16)(const Product *product, const float *g, const float *pairs);
    void (*round_pairs)(const float *values, int64_t n, float *pairs);
    const LowRank *low_rank;
    void (*quantize)(int format, const float *x, int64_t columns, int64_t token, const Activations *to);
    void (*int8)(const Product *product, const Activations *x);
    const Vectors *vectors;
    const Pointwise *pointwise;
    const AttentionLoops *attention;
} Level;

const Level *qgraft_level(void); /* the one chosen */

/* sizeof of the structures that Python fills in, in the order in which their file defines them: for a test. */
extern const int64_t qgraft_linear_sizes[2], qgraft_attention_sizes[2], qgraft_decode_sizes[4];

extern const Level qgraft_base;
#if HAVE_X86_LEVELS
extern const Level qgraft_v3, qgraft_v4, qgraft_v4_vnni, qgraft_v4_bf16;
void qgraft_int8_v3(const Product *product, const Activations *x);
void qgraft_int8_vnni(const Product *product, const Activations *x);
#endif

/* Ask memory for what is AHEAD of these bytes, while they are multiplied. A row is too short for the CPU to see that the
 * next one follows: without this, products of one row of x with weights from memory took two to five times as long. */
ALWAYS_INLINE void fetch_ahead(const void *bytes, int64_t count) {
    for (int64_t j = 0; j < count; j += 64) __builtin_prefetch((const char *)bytes + AHEAD + j);
}

/* Bytes of `columns` weights of one row, -1 for an unknown format. */
ALWAYS_INLINE int64_t row_bytes(int format, int64_t columns) {
    switch (format) {
        case Q4_0: return columns / 32 * 18;
        case Q4_1: return columns / 32 * 20;
        case Q5_0: return columns / 32 * 22;
        case Q5_1: return columns / 32 * 24;
        case Q8_0: return columns / 32 * 34;
        case ROW_INT8: return columns;
        case ROW_INT4: return columns / 2;
        case F16: case BF16: return columns * 2;
        case F32: return columns * 4;
        case Q4_K: return columns / 256 * 144;
        case Q5_K: return columns / 256 * 176;
        case Q6_K: return columns / 256 * 210;
    }
    return -1;
}

/* Whether there are products in 8-bit integers (int8.h) for the format. */
ALWAYS_INLINE int has_int8(int format) {
    return format == Q4_0 || format == Q4_1 || format == Q8_0 || format == ROW_INT8 || format == ROW_INT4;
}

/* IEEE half -> float, all values: subnormals, infinities, NaN. Without a hardware half type, and without branches, so
 * that the loop over a row of halves is vectorized. */
ALWAYS_INLINE float half_to_float(const uint8_t *p) {
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

/* q4_k, q5_k: 12 bytes -> 8 scales and 8 minimums of 6 bits, as in formats/kquants.py. */
ALWAYS_INLINE void read_pairs(const uint8_t *p, uint8_t scales[8], uint8_t minimums[8]) {
    uint32_t a, b, c;
    memcpy(&a, p, 4), memcpy(&b, p + 4, 4), memcpy(&c, p + 8, 4);
    const uint32_t s[2] = {a & 0x3f3f3f3f, (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)};
    const uint32_t n[2] = {b & 0x3f3f3f3f, (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)};
    memcpy(scales, s, 8), memcpy(minimums, n, 8);
}

#endif
