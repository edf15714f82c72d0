/* A frozen packed layer with any number of LoRAs on it, forward and backward, each in one call.
 *
 *     forward    h = x A^T                 y  = x W^T + bias + s h B^T
 *     backward   gh = s g B                gx = g W + gh A                 gA = gh^T x        gB = s g^T h
 *
 * Each LoRA serves tokens of its own, start <= t < stop: all of them, or the samples of one job among others. As products
 * of their own they would pass over x, y and g five times more, and take a dozen calls of torch.
 *
 * Everything is float32 but the product with W, where x and W (g and W) may be rounded to bfloat16 (`bf16`).
 * Threads share the tokens for h, blocks of columns and of tokens for the products, and blocks of columns for the
 * gradients of A and B: the order of each sum depends on none of this.
 */

#include <stddef.h>

#include "native.h"

/* As the structures of native.py, field by field. */
typedef struct {
    int64_t start, stop, rank;
    double scaling;
    const float *A, *B;     /* [rank, columns], [rows, rank] */
    const float *x;         /* [tokens, columns]: what A multiplies, x or x with some dropped; tokens = stop - start */
    float *h;               /* [tokens, rank]: forward writes it, backward reads it */
    float *gh;              /* [tokens, rank]: backward writes it */
    float *grad_A, *grad_B; /* backward writes those that are not NULL */
    int64_t adds;           /* backward: whether gh A is added to gx */
} Term;

typedef struct {
    int64_t format, rows, columns, m, bf16, terms;
    const uint8_t *data; /* NULL: the product with W stands in `out` */
    const float *scales, *bias;
    const float *in; /* forward: x [m, columns], backward: g [m, rows] */
    float *out;      /* y [m, rows], or gx [m, columns], which may be NULL */
    float *scratch;  /* bf16: m (width of `in` / 2 + 1) floats; and rank (rows + 2 tokens) for each term */
    const Term *term;
} Layer;

const int64_t qgraft_linear_sizes[] = {sizeof(Term), sizeof(Layer)};

enum { TOKENS = 32, COLUMNS = 64, MANY = 20, PART = 96 };

/* Where the parts of `scratch` begin: pairs of all tokens; of term k: s B^T [rank, rows], then backward's h^T and gh^T. */
static float *term_scratch(const Layer *of, int64_t width, int64_t k) {
    float *at = of->scratch + (of->bf16 ? of->m * (width / 2 + 1) : 0);
    for (const Term *term = of->term; term < of->term + k; term++)
        at += term->rank * (of->rows + 2 * (term->stop - term->start));
    return at;
}

/* s B^T [rank, rows], by all threads. */
static void transpose_B(const Layer *of, const Term *term, float *low) {
#pragma omp for schedule(static)
    for (int64_t r0 = 0; r0 < of->rows; r0 += COLUMNS)
        for (int64_t i = 0; i < term->rank; i++)
            for (int64_t r = r0; r < r0 + COLUMNS && r < of->rows; r++)
                low[i * of->rows + r] = (float)term->scaling * term->B[r * term->rank + i];
}

/* to [n, rank] = from [n, width] low^T. */
static void narrow(const Level *use, const float *low, int64_t rank, int64_t width, const float *from, int64_t n, float *to) {
    const Product product = {F32, (const uint8_t *)low, NULL, row_bytes(F32, width), rank, width, 0, rank, n, to};
    use->small(&product, from);
}

/* What a block of columns and tokens adds of the LoRAs: in [tokens, rank] of each, low [rank, width] of each. */
static void add_terms(const Level *use, const Layer *of, int backward, const Product *part, int64_t t0) {
    const int64_t width = backward ? of->columns : of->rows;
    for (int64_t k = 0; k < of->terms; k++) {
        const Term *term = of->term + k;
        const int64_t start = term->start > t0 ? term->start : t0;
        const int64_t stop = term->stop < t0 + part->m ? term->stop : t0 + part->m;
        if (start >= stop || (backward && !term->adds)) continue;
        const float *low = backward ? term->A : term_scratch(of, of->columns, k);
        const float *in = (backward ? term->gh : term->h) + (start - term->start) * term->rank;
        use->low_rank->add(in, stop - start, term->rank, low + part->first, width, part->last - part->first,
                           of->out + start * width + part->first, width);
    }
}

/* One block of columns for the tokens t0 <= t < t1: the product, the bias, the LoRAs. */
static void block(const Level *use, const Layer *of, int backward, int64_t first, int64_t t0, int64_t t1) {
    const int64_t width = backward ? of->columns : of->rows, depth = backward ? of->rows : of->columns;
    const int64_t last = first + COLUMNS < width ? first + COLUMNS : width;
    const float *in = of->in + t0 * depth, *pairs = of->scratch + t0 * ((depth + 1) / 2);
    const Product part = {(int)of->format, of->data, of->scales, row_bytes((int)of->format, of->columns), of->rows,
                          of->columns, first, last, t1 - t0, of->out + t0 * width};
    if (of->data && backward) {
        if (of->bf16) use->backward_bf16(&part, in, pairs);
        else use->backward(&part, in);
    } else if (of->data) {
        if (of->bf16) use->forward_bf16(&part, in, pairs);
        else if (of->m < MANY || !use->forward) use->small(&part, in);
        else use->forward(&part, in);
    }
    for (int64_t t = t0; of->bias && !backward && t < t1; t++)
        for (int64_t r = first; r < last; r++) of->out[t * width + r] += of->bias[r];
    add_terms(use, of, backward, &part, t0);
}

/* All blocks, and before them what the tokens of each need: pairs, h or gh. */
static void products(const Level *use, const Layer *of, int backward, int threads) {
    const int64_t width = backward ? of->columns : of->rows, depth = backward ? of->rows : of->columns;
    const int64_t blocks = (width + COLUMNS - 1) / COLUMNS, parts = of->m >= PART * threads ? threads : 1;
    for (int64_t k = 0; k < of->terms; k++) transpose_B(of, of->term + k, term_scratch(of, depth, k));
    const int rounds = of->bf16 && of->data && of->out, first_pass = rounds || of->terms;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < (first_pass ? of->m : 0); t += TOKENS) {
        const int64_t end = t + TOKENS < of->m ? t + TOKENS : of->m;
        for (int64_t i = t; rounds && i < end; i++)
            use->round_pairs(of->in + i * depth, depth, of->scratch + i * ((depth + 1) / 2));
        for (int64_t k = 0; k < of->terms; k++) {
            const Term *term = of->term + k;
            const int64_t start = term->start > t ? term->start : t, stop = term->stop < end ? term->stop : end;
            const int64_t at = start - term->start;
            if (start >= stop) continue;
            if (backward) narrow(use, term_scratch(of, depth, k), term->rank, depth, of->in + start * depth, stop - start,
                                 term->gh + at * term->rank);
            else narrow(use, term->A, term->rank, depth, term->x + at * depth, stop - start, term->h + at * term->rank);
        }
    }
#pragma omp for schedule(dynamic)
    for (int64_t share = 0; share < (of->out ? blocks * parts : 0); share++) {
        const int64_t part = share % parts;
        block(use, of, backward, share / parts * COLUMNS, of->m * part / parts, of->m * (part + 1) / parts);
    }
}

/* gA = gh^T x and gB = s g^T h, blocks of their columns shared out. */
static void gradients(const Level *use, const Layer *of) {
    for (int64_t k = 0; k < of->terms; k++) {
        const Term *term = of->term + k;
        const int64_t tokens = term->stop - term->start, rank = term->rank;
        float *h_t = term_scratch(of, of->rows, k) + rank * of->rows, *gh_t = h_t + rank * tokens;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rank; i++)
            for (int64_t t = 0; t < tokens; t++)
                h_t[i * tokens + t] = term->h[t * rank + i], gh_t[i * tokens + t] = term->gh[t * rank + i];
#pragma omp for schedule(dynamic) nowait
        for (int64_t c = 0; c < (term->grad_A ? of->columns : 0); c += COLUMNS) {
            const int64_t n = c + COLUMNS < of->columns ? COLUMNS : of->columns - c;
            use->low_rank->reduce(gh_t, tokens, rank, term->x + c, of->columns, n, term->grad_A + c, of->columns);
        }
#pragma omp for schedule(dynamic)
        for (int64_t r0 = 0; r0 < (term->grad_B ? of->rows : 0); r0 += COLUMNS) {
            const int64_t n = r0 + COLUMNS < of->rows ? COLUMNS : of->rows - r0;
            float *sums = term_scratch(of, of->rows, k) + r0; /* s B^T has served */
            use->low_rank->reduce(h_t, tokens, rank, of->in + term->start * of->rows + r0, of->rows, n, sums, of->rows);
            for (int64_t r = 0; r < n; r++)
                for (int64_t i = 0; i < rank; i++)
                    term->grad_B[(r0 + r) * rank + i] = (float)term->scaling * sums[i * of->rows + r];
        }
    }
}

/* The forward or backward pass. 0; -1 for a bad format, or a pass that this CPU level has no loops for (base). */
int qgraft_linear(const Layer *layer, int backward, int threads) {
    enum { PARALLEL_WORK = 65536 }; /* fewer products are done before a second thread has woken up */
    const Level *use = qgraft_level();
    Layer of = *layer;
    if ((backward || of.terms) && !use->low_rank) return -1;
    if (of.data && row_bytes((int)of.format, of.columns) < 0) return -1;
    of.bf16 = of.bf16 && use->forward_bf16;
    if (of.rows * of.columns * of.m <= PARALLEL_WORK) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        products(use, &of, backward, threads);
        if (backward) gradients(use, &of);
    }
    return 0;
}
