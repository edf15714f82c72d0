/* A frozen packed layer with any number of LoRAs on it, forward and backward, each in one call; and many layers in one, each
 * with rows of its own: the experts of a mixture. Their blocks are shared out one behind the other, without a barrier between.
 *
 *     forward    h = x A^T                 y  = x W^T + bias + s h B^T
 *     backward   gh = s g B                gx = g W + gh A                 gA = gh^T x        gB = s g^T h
 *
 * Each LoRA serves tokens of its own, start <= t < stop: all of them, or the samples of one job among others. As products
 * of their own they would pass over x, y and g five times more, and take a dozen calls of torch.
 *
 * Everything is float32 but the product with W: there x and W (g and W) may be rounded to bfloat16, or x (g) to 8 bits.
 * Threads share the tokens for h, blocks of columns and of tokens for the products, and blocks of columns for the
 * gradients of A and B: the order of each sum depends on none of this.
 */

#include <stddef.h>
#include <stdint.h>

#include "common.h"
#include "formats.h"
#include "level.h"
#include "product.h"

/* As the structures of abi.py, field by field. */
typedef struct {
    int64_t start, stop, rank;
    double scaling;
    const float *A, *B;     /* [rank, columns], [rows, rank] */
    const float *x;         /* [tokens, columns]: what A multiplies, x or x with some dropped; tokens = stop - start */
    float *h;               /* [tokens, rank]: forward writes it, backward reads it */
    float *gh;              /* [tokens, rank]: backward writes it */
    float *grad_A, *grad_B; /* backward writes those that are not NULL */
    int64_t adds;           /* backward: whether gh A is added to gx */
} LoraTerm;

typedef struct {
    int64_t format, rows, columns, m, rounding, terms; /* rounding: FLOAT32, BFLOAT16, INT8 */
    const uint8_t *data; /* NULL: the product with W stands in `out` */
    const float *scales, *bias;
    const float *in; /* forward: x [m, columns], backward: g [m, rows] */
    float *out;      /* y [m, rows], or gx [m, columns], which may be NULL */
    float *scratch;  /* as many floats as scratch_size says, and rank (rows + 2 tokens) for each term */
    const LoraTerm *term;
} LinearCall;

const int64_t qgraft_linear_sizes[] = {sizeof(LoraTerm), sizeof(LinearCall)};

enum { FLOAT32, BFLOAT16, INT8 };
enum { TOKENS = 32, COLUMNS = 64, FEW_COLUMNS = 384, PART = 96, TILE = 6, OCTET = 8, SHARES = 3 };

/* Floats that x or g [m, width] take when they are rounded: pairs, or forward the codes, steps and sums of quantize_x.h. */
static int64_t scratch_size(const LinearCall *call, int64_t width) {
    if (call->rounding == BFLOAT16) return call->m * (width / 2 + 1);
    return call->rounding == INT8 ? call->m * groups_of(width) * 10 : 0;
}

/* Codes of the tokens from t0 on. */
static QuantizedX codes_of(const LinearCall *call, int64_t t0) {
    const int64_t groups = groups_of(call->columns), all = call->m * groups, at = t0 * groups;
    return (QuantizedX){(int8_t *)(call->scratch + 2 * all) + 32 * at, call->scratch + at, call->scratch + all + at, groups};
}

/* Where the parts of `scratch` begin: what all tokens are rounded to; of term k: s B^T [rank, rows], then backward's h^T and
 * gh^T. */
static float *term_scratch(const LinearCall *call, int64_t width, int64_t k) {
    float *at = call->scratch + scratch_size(call, width);
    for (const LoraTerm *term = call->term; term < call->term + k; term++)
        at += term->rank * (call->rows + 2 * (term->stop - term->start));
    return at;
}

/* s B^T [rank, rows], by all threads. */
static void transpose_B(const LinearCall *call, const LoraTerm *term, float *factor) {
#pragma omp for schedule(static) nowait
    for (int64_t r0 = 0; r0 < call->rows; r0 += COLUMNS)
        for (int64_t i = 0; i < term->rank; i++)
            for (int64_t r = r0; r < r0 + COLUMNS && r < call->rows; r++)
                factor[i * call->rows + r] = (float)term->scaling * term->B[r * term->rank + i];
}

/* h [n, rank] = x [n, width] A^T, or gh = g (s B^T)^T: products with a LoRA's factor [rank, width]. */
static void down_project(const Level *level, const float *factor, int64_t rank, int64_t width, const float *x, int64_t n,
                         float *h) {
    const Product product = {F32, (const uint8_t *)factor, NULL, row_bytes(F32, width), rank, width, 0, rank, n, h, NULL};
    level->gemv(&product, x);
}

/* What a block of columns and tokens adds of the LoRAs: in [tokens, rank] and factor [rank, width] of each. */
static void add_terms(const Level *level, const LinearCall *call, int backward, const Product *part, int64_t t0) {
    const int64_t width = backward ? call->columns : call->rows;
    for (int64_t k = 0; k < call->terms; k++) {
        const LoraTerm *term = call->term + k;
        const int64_t start = term->start > t0 ? term->start : t0;
        const int64_t stop = term->stop < t0 + part->m ? term->stop : t0 + part->m;
        if (start >= stop || (backward && !term->adds)) continue;
        const float *factor = backward ? term->A : term_scratch(call, call->columns, k);
        const float *in = (backward ? term->gh : term->h) + (start - term->start) * term->rank;
        level->low_rank->add(in, stop - start, term->rank, factor + part->first, width, part->last - part->first,
                           call->out + start * width + part->first, width);
    }
}

/* y of a block. 8-bit products of few tokens have loops of their own. */
static void forward(const Level *level, const LinearCall *call, const Product *part, const float *in, int64_t t0) {
    const QuantizedX codes = codes_of(call, t0);
    if (call->rounding == BFLOAT16) level->gemm_bf16(part, in, call->scratch + t0 * ((call->columns + 1) / 2));
    else if (call->rounding == INT8 && call->m >= INT8_MANY && level->gemm_int8_panels) level->gemm_int8_panels(part, &codes);
    else if (call->rounding == INT8) level->gemm_int8(part, &codes);
    else multiply_block(level, part, call->m, in);
}

/* gx of a block. */
static void backward_input(const Level *level, const LinearCall *call, const Product *part, const float *in, int64_t t0) {
    if (call->rounding == BFLOAT16) level->gemm_grad_input_bf16(part, in, call->scratch + t0 * ((call->rows + 1) / 2));
    else if (call->rounding == INT8) level->gemm_grad_input_int8(part, in);
    else level->gemm_grad_input(part, in);
}

/* One block, the columns first <= j < last of the tokens t0 <= t < t1: the product, the bias, the LoRAs. */
static void block(const Level *level, const LinearCall *call, int backward, int64_t first, int64_t last, int64_t t0,
                  int64_t t1) {
    const int64_t width = backward ? call->columns : call->rows, depth = backward ? call->rows : call->columns;
    const float *in = call->in + t0 * depth;
    const int64_t stride = row_bytes((int)call->format, call->columns);
    const Product part = {(int)call->format, call->data, call->scales, stride, call->rows, call->columns, first, last,
                          t1 - t0, call->out + t0 * width, NULL};
    if (call->data) (backward ? backward_input : forward)(level, call, &part, in, t0);
    for (int64_t t = t0; call->bias && !backward && t < t1; t++)
        for (int64_t r = first; r < last; r++) call->out[t * width + r] += call->bias[r];
    add_terms(level, call, backward, &part, t0);
}

/* How many tokens and columns a block has: as few blocks as a level's loops like best, but a few for each thread. 8-bit gradients
 * round g for each block of columns anew, so these are wide. */
static void block_size(const Level *level, const LinearCall *call, int backward, int threads, int64_t *tokens,
                       int64_t *columns) {
    const int64_t width = backward ? call->columns : call->rows;
    const int64_t shares = backward && call->rounding == INT8 ? threads : SHARES * threads;
    const int64_t most = level->gemm ? level->block_tokens : INT32_MAX;
    const int64_t parts = larger(call->m >= PART * threads ? threads : 1, (call->m + most - 1) / most);
    const int64_t share = threads > 1 ? width * parts / shares : width;
    const int64_t tile = call->rounding == INT8 ? OCTET : TILE;
    *tokens = larger(round_up((call->m + parts - 1) / parts, tile), tile);
    const int few = !backward && call->rounding == FLOAT32 && call->m < level->many; /* gemv turns x for each block anew */
    const int64_t widest = few ? FEW_COLUMNS : level->block_columns;
    *columns = level->gemm ? larger(COLUMNS, smaller(widest, round_up(share, COLUMNS))) : COLUMNS;
}

/* Whether tokens need something before their blocks: pairs, codes, h or gh. */
static int has_first_pass(const LinearCall *call, int backward) {
    const int rounds = call->rounding == BFLOAT16 || (call->rounding == INT8 && !backward);
    return call->terms || (rounds && call->data && call->out);
}

/* What the tokens of each block need. */
static void first_pass(const Level *level, const LinearCall *call, int backward) {
    const int64_t depth = backward ? call->rows : call->columns;
    const int product = call->data && call->out, to_codes = product && call->rounding == INT8 && !backward;
    const int to_pairs = product && call->rounding == BFLOAT16;
    const QuantizedX codes = codes_of(call, 0);
#pragma omp for schedule(dynamic) nowait
    for (int64_t t = 0; t < call->m; t += TOKENS) {
        const int64_t end = t + TOKENS < call->m ? t + TOKENS : call->m;
        for (int64_t i = t; i < end; i++) {
            if (to_pairs) level->round_pairs(call->in + i * depth, depth, call->scratch + i * ((depth + 1) / 2));
            if (to_codes) level->quantize_x((int)call->format, call->in + i * depth, depth, i, &codes);
        }
        for (int64_t k = 0; k < call->terms; k++) {
            const LoraTerm *term = call->term + k;
            const int64_t start = term->start > t ? term->start : t, stop = term->stop < end ? term->stop : end;
            const int64_t at = start - term->start;
            if (start >= stop) continue;
            const float *factor = backward ? term_scratch(call, depth, k) : term->A;
            const float *in = backward ? call->in + start * depth : term->x + at * depth;
            float *h = (backward ? term->gh : term->h) + at * term->rank;
            down_project(level, factor, term->rank, depth, in, stop - start, h);
        }
    }
}

/* All blocks; `threads`: how many of them share this layer. */
static void products(const Level *level, const LinearCall *call, int backward, int threads) {
    const int64_t width = backward ? call->columns : call->rows;
    int64_t tokens, columns;
    block_size(level, call, backward, threads, &tokens, &columns);
    const int64_t blocks = (width + columns - 1) / columns, parts = (call->m + tokens - 1) / tokens;
#pragma omp for schedule(dynamic) nowait
    for (int64_t share = 0; share < (call->out ? blocks * parts : 0); share++) {
        const int64_t first = share / parts * columns, t0 = share % parts * tokens;
        block(level, call, backward, first, smaller(first + columns, width), t0, smaller(t0 + tokens, call->m));
    }
}

/* gA = gh^T x and gB = s g^T h, blocks of their columns shared out. */
static void gradients(const Level *level, const LinearCall *call) {
    for (int64_t k = 0; k < call->terms; k++) {
        const LoraTerm *term = call->term + k;
        const int64_t tokens = term->stop - term->start, rank = term->rank;
        float *h_t = term_scratch(call, call->rows, k) + rank * call->rows, *gh_t = h_t + rank * tokens;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rank; i++)
            for (int64_t t = 0; t < tokens; t++)
                h_t[i * tokens + t] = term->h[t * rank + i], gh_t[i * tokens + t] = term->gh[t * rank + i];
#pragma omp for schedule(dynamic) nowait
        for (int64_t c = 0; c < (term->grad_A ? call->columns : 0); c += COLUMNS) {
            const int64_t n = c + COLUMNS < call->columns ? COLUMNS : call->columns - c;
            level->low_rank->reduce(gh_t, tokens, rank, term->x + c, call->columns, n, term->grad_A + c, call->columns);
        }
#pragma omp for schedule(dynamic)
        for (int64_t r0 = 0; r0 < (term->grad_B ? call->rows : 0); r0 += COLUMNS) {
            const int64_t n = r0 + COLUMNS < call->rows ? COLUMNS : call->rows - r0;
            const float *g = call->in + term->start * call->rows + r0;
            float *sums = term_scratch(call, call->rows, k) + r0; /* s B^T has served */
            level->low_rank->reduce(h_t, tokens, rank, g, call->rows, n, sums, call->rows);
            for (int64_t r = 0; r < n; r++)
                for (int64_t i = 0; i < rank; i++)
                    term->grad_B[(r0 + r) * rank + i] = (float)term->scaling * sums[i * call->rows + r];
        }
    }
}

/* Whether the product can be taken in 8 bits: what Python has asked for otherwise is a mistake. */
static int has_rounding(const Level *level, const LinearCall *call, int backward) {
    if (call->rounding != INT8 || !call->data) return 1;
    if (backward) return has_int8_gradient((int)call->format) && level->gemm_grad_input_int8;
    return has_int8((int)call->format);
}

/* The layer as it is computed: without loops for bfloat16, in float32. */
static LinearCall settled(const Level *level, const LinearCall *asked) {
    LinearCall call = *asked;
    if (call.rounding == BFLOAT16 && !level->gemm_bf16) call.rounding = FLOAT32;
    return call;
}

/* The forward or backward pass of `count` layers, whose outputs and scratch lie apart. 0; -1 for a bad format, or a pass that
 * this CPU level has no loops for (base). */
int qgraft_linear(const LinearCall *asked, int64_t count, int backward, int threads) {
    enum { PARALLEL_WORK = 65536 }; /* fewer products are done before a second thread has woken up */
    const Level *level = qgraft_level();
    int64_t work = 0, terms = 0, passes = 0;
    for (const LinearCall *call = asked; call < asked + count; call++) {
        if ((backward || call->terms) && !level->low_rank) return -1;
        if (call->data && row_bytes((int)call->format, call->columns) < 0) return -1;
        if (!has_rounding(level, call, backward)) return -1;
        work += call->rows * call->columns * call->m, terms += call->terms, passes += has_first_pass(call, backward);
    }
    if (work <= PARALLEL_WORK) threads = 1;
    const int sharing = count >= SHARES * threads ? 1 : threads; /* many layers are shared out whole */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int64_t i = 0; i < (terms ? count : 0); i++) {
            const LinearCall call = settled(level, asked + i);
            for (int64_t k = 0; k < call.terms; k++)
                transpose_B(&call, call.term + k, term_scratch(&call, backward ? call.rows : call.columns, k));
        }
        if (terms) {
#pragma omp barrier
        }
        for (int64_t i = 0; i < (passes ? count : 0); i++) {
            const LinearCall call = settled(level, asked + i);
            if (has_first_pass(&call, backward)) first_pass(level, &call, backward);
        }
        if (passes) {
#pragma omp barrier
        }
        for (int64_t i = 0; i < count; i++) {
            const LinearCall call = settled(level, asked + i);
            products(level, &call, backward, sharing);
        }
        if (backward && terms) {
#pragma omp barrier
            for (int64_t i = 0; i < count; i++) {
                const LinearCall call = settled(level, asked + i);
                gradients(level, &call);
            }
        }
    }
    return 0;
}
