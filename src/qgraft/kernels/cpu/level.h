/* One level of CPU: the loops that the drivers call, as a structure of function pointers, and what is handed to them.
 *
 * One build serves every machine: it holds these levels, and one is chosen when the library is loaded (level.c).
 *
 *   level_plain.c         plain          any CPU
 *   level_avx2.c          avx2           x86-64-v3: AVX2, FMA, F16C
 *   level_avx512.c        avx512         x86-64-v4; its 8-bit products are those of avx2
 *                         avx512-vnni    the same with VNNI: 8-bit products of its own
 *   level_avx512_bf16.c   avx512-bf16    the same with AVX512-BF16: products of bfloat16 numbers
 *
 * The vector levels are the same headers (vector_level.h), compiled for the one CPU and the other. A header's functions are
 * compiled for the CPU of the `#pragma GCC target` in front of its inclusion; this one has none, so it may come before.
 */

#ifndef QGRAFT_LEVEL_H
#define QGRAFT_LEVEL_H

#include <stdint.h>

/* The levels of vectors need gcc 11, which can compile for x86-64-v3 and v4; clang has no `#pragma GCC target`. */
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define HAVE_X86_LEVELS 1
#else
#define HAVE_X86_LEVELS 0
#endif

/* What will be read when a product is done: it may be fetched meanwhile, while multiplying leaves memory idle. */
typedef struct {
    const void *from;
    int64_t bytes;
} Bytes;

typedef struct {
    Bytes *runs;
    int64_t count;
} Ahead;

/* Rows first <= r < last of one product y [m, rows] = x [m, columns] W^T; y is written at y[i * rows + r]. */
typedef struct {
    int format;
    const uint8_t *data;
    const float *scales; /* [rows], NULL for formats without row scales */
    int64_t stride, rows, columns, first, last;
    int64_t m;
    float *y;
    const Ahead *ahead; /* NULL for nothing */
} Product;

/* x in 8 bits (quantize_x.h): [m, groups] each; the columns after the last are codes 0 with step 0. */
typedef struct {
    int8_t *codes; /* 32 to a group */
    float *steps, *sums;
    int64_t groups;
} QuantizedX;

/* What a LoRA adds to products (low_rank.h). */
typedef struct {
    void (*add)(const float *in, int64_t m, int64_t rank, const float *factor, int64_t factor_stride, int64_t width,
                float *out, int64_t out_stride);
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

/* What decoding computes for one token (decode_attention.h, vector_math.h). */
typedef struct {
    void (*add_rows)(const float *rows, const float *h, int64_t n, int64_t rank, float *y);
    void (*attention)(const float *q, int64_t heads, const float *keys, const float *values, const int64_t *spans,
                      int64_t count, int64_t channels, float scale, const float *sinks, float *scores, float *out);
    void (*clamped_gate)(const float *gate, const float *up, float limit, float alpha, int64_t n, float *h);
} Decoding;

/* Token t of head h is at data + t * token + h * head; its channels follow one another. */
typedef struct {
    const float *data;
    int64_t token, head;
} Strided;

/* Attention of samples that share a row of tokens (varlen_attention.h). As the structure of abi.py, field by field. */
typedef struct {
    Strided q, k, v, front_k, front_v;                       /* front: a prefix, in front of the keys of every sample */
    int64_t heads, groups, channels, tokens, samples, prefix, window; /* prefix, window: 0 for none */
    const int64_t *bounds, *contexts; /* [samples + 1], [samples] or NULL: tokens at the start that all of a sample see */
    double scale;
} Attention;

/* Queries at a time, forward and backward; keys of a panel. */
enum { ATTENTION_QUERIES = 24, ATTENTION_QUERIES_BACKWARD = 48, ATTENTION_PANEL = 64 };

/* What varlen_attention.c shares out. `packed`: the keys and values of a group, in parts of `size` numbers. */
typedef struct {
    void (*pack)(const Attention *call, int64_t sample, int64_t group, int backward, float *packed, int64_t size);
    void (*forward)(const Attention *call, int64_t sample, int64_t head, const float *packed, int64_t size, float *scratch,
                    float *out, float *lse);
    void (*backward)(const Attention *call, int64_t sample, int64_t head, const float *packed, int64_t size, float *scratch,
                     const float *g, const float *out, const float *lse, float *gq, float *gk, float *gv);
} VarlenAttention;

/* Some columns of a weight whose codes are moved (descend.h): R, codes, steps, moved [columns, rows], H [columns, columns]. */
typedef struct {
    const float *R;
    float *codes;
    const float *steps, *H;
    int64_t columns, rows;
    int low, high;
    float *moved;
} Descent;

enum { DESCENT_COLUMNS = 64 }; /* the most */

typedef struct {
    const char *name;
    void (*unpack_row)(int format, const uint8_t *row, int64_t columns, float scale, float *out);
    void (*unpack_row_bf16)(int format, const uint8_t *row, int64_t columns, float scale, uint16_t *out);
    void (*gemv)(const Product *product, const float *x); /* for few rows of x */
    /* For `many` and more, at most `block_columns` of y and `block_tokens` at a time; NULL where there is none. */
    int64_t many, block_columns, block_tokens;
    void (*gemm)(const Product *product, const float *x);
    void (*gemm_grad_input)(const Product *product, const float *g);
    /* The same with x and W (g and W) rounded to bfloat16: `pairs` [m, columns (rows) / 2, rounded up], two in each. */
    void (*gemm_bf16)(const Product *product, const float *x, const float *pairs);
    void (*gemm_grad_input_bf16)(const Product *product, const float *g, const float *pairs);
    void (*round_pairs)(const float *values, int64_t n, float *pairs);
    const LowRank *low_rank;
    void (*quantize_x)(int format, const float *x, int64_t columns, int64_t token, const QuantizedX *to);
    void (*gemm_int8)(const Product *product, const QuantizedX *x);
    /* For many tokens, as `gemm`, and more formats; NULL where there is none. */
    void (*gemm_int8_panels)(const Product *product, const QuantizedX *x);
    void (*gemm_grad_input_int8)(const Product *product, const float *g);
    const Pointwise *pointwise;
    const Decoding *decoding;
    const VarlenAttention *attention;
    void (*descend)(const Descent *call, int64_t first, int64_t last); /* rows first <= r < last */
} Level;

const Level *qgraft_level(void); /* the one chosen */

extern const Level qgraft_plain;
#if HAVE_X86_LEVELS
extern const Level qgraft_avx2, qgraft_avx512, qgraft_avx512_vnni, qgraft_avx512_bf16;
void qgraft_gemm_int8_avx2(const Product *product, const QuantizedX *x); /* these serve several levels */
void qgraft_gemm_int8_vnni(const Product *product, const QuantizedX *x);
void qgraft_gemv_vnni(const Product *product, const float *x);
#endif

/* sizeof of the structures that Python fills in, in the order in which their file defines them: for a test. */
extern const int64_t qgraft_linear_sizes[2], qgraft_attention_sizes[2], qgraft_decode_sizes[8];

#endif
