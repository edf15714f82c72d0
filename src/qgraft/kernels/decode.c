/* One token of one sequence through a whole decoder of Llama's kind, in one call.
 *
 *     for each layer:  n = norm(x);  q, k, v = n Wq, n Wk, n Wv;  norm of q and k by heads (Qwen3);  rotate q and k;
 *                      append k and v;  x += attention(q) Wo;  n = norm(x);  x += (silu(n Wg) * n Wu) Wd
 *     x = norm(x)
 *
 * Each W may have a bias and any number of LoRAs. All in float32, the products of a single row of small.h; those with W
 * are in 8-bit integers (int8.h) where the layer asks for it.
 *
 * A product of one row takes 20 microseconds, so calls and passes of their own for each, in Python and torch, take
 * longer than the work. Here the threads stay in one parallel region. Rows of W, or heads, are shared out evenly, and
 * there are five barriers in a layer; what is cheap (norms, x A^T of a LoRA, the rotated key) each thread computes for
 * itself instead of waiting for another one. OpenMP's own barrier, between pieces of 20 microseconds, either sleeps, and
 * waking takes as long, or spins for milliseconds where another process has the core; so this one spins for a moment
 * and then sleeps.
 */

#include <stdatomic.h>
#include <stdlib.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "native.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

/* As the structures of decode.py, field by field. */
typedef struct {
    const float *A, *B; /* [rank, columns], [rows, rank] */
    int64_t rank;
    double scaling;
} Lora;

typedef struct {
    int64_t format, rows, columns, int8, loras; /* int8: x is rounded to 8 bits (activations.h) */
    const uint8_t *data;
    const float *scales, *bias; /* [rows] or NULL */
    const Lora *lora;           /* [loras] */
} Linear;

typedef struct {
    Linear q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm; /* [hidden] */
    const float *q_norm, *k_norm;           /* [channels] or NULL */
    float *keys, *values;                   /* [groups, capacity, channels] */
} Layer;

typedef struct {
    int64_t layers, hidden, inner, heads, groups, channels, rank, capacity; /* rank: of the largest LoRA */
    double epsilon, scale;
    const float *norm;
    const Layer *layer;
} Model;

const int64_t qgraft_decode_sizes[] = {sizeof(Lora), sizeof(Linear), sizeof(Layer), sizeof(Model)};

typedef struct {
    atomic_int arrived, rounds, asleep;
} Barrier;

/* What one thread knows. */
typedef struct {
    const Model *model;
    const Level *use;
    Barrier *barrier;
    int64_t index, count;
    float *x;                                 /* [hidden] */
    float *q, *k, *v, *mixed, *gate, *up;     /* shared by the threads */
    float *normed, *narrow, *head, *scores;   /* its own */
    Activations codes;                        /* its own */
    const float *cos, *sin;                   /* [channels] */
    int64_t position;
} Thread;

/* Wait until all threads have come here. */
static void meet(const Thread *of) {
    enum { SPINS = 1000 }; /* some 10 microseconds */
    Barrier *at = of->barrier;
    const int round = atomic_load(&at->rounds);
    if (atomic_fetch_add(&at->arrived, 1) + 1 == of->count) {
        atomic_store(&at->arrived, 0);
        atomic_store(&at->rounds, round + 1);
#ifdef __linux__
        if (atomic_load(&at->asleep)) syscall(SYS_futex, &at->rounds, FUTEX_WAKE_PRIVATE, of->count, NULL, NULL, 0);
#endif
        return;
    }
    for (int spins = 0; atomic_load(&at->rounds) == round; spins++) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
#ifdef __linux__
        if (spins < SPINS) continue;
        atomic_fetch_add(&at->asleep, 1); /* returns at once where the round has changed meanwhile */
        syscall(SYS_futex, &at->rounds, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
        atomic_fetch_sub(&at->asleep, 1);
#endif
    }
}

/* Groups of a row in 8 bits: an even number. */
static int64_t groups_of(int64_t columns) { return (columns + 63) / 64 * 2; }

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* The thread's share of `n`, in whole tiles of 8 rows. */
static void share_of(const Thread *of, int64_t n, int64_t *first, int64_t *last) {
    const int64_t tiles = (n + 7) / 8;
    *first = 8 * (tiles * of->index / of->count), *last = 8 * (tiles * (of->index + 1) / of->count);
    if (*last > n) *last = n;
}

/* The thread's rows of y = W x + b + LoRAs; added to y where `add`. */
static void project(const Thread *of, const Linear *linear, const float *x, float *y, float *scratch, int add) {
    int64_t first, last;
    share_of(of, linear->rows, &first, &last);
    if (first >= last) return;
    float *to = add ? scratch : y;
    const Product product = {(int)linear->format, linear->data, linear->scales, row_bytes((int)linear->format, linear->columns),
                             linear->rows, linear->columns, first, last, 1, to};
    if (linear->int8) {
        const Activations codes = {of->codes.codes, of->codes.steps, of->codes.sums, groups_of(linear->columns)};
        of->use->quantize(product.format, x, linear->columns, 0, &codes);
        of->use->int8(&product, &codes);
    } else of->use->small(&product, x);
    if (linear->bias)
        for (int64_t r = first; r < last; r++) to[r] += linear->bias[r];
    for (const Lora *lora = linear->lora; lora < linear->lora + linear->loras; lora++) {
        for (int64_t i = 0; i < lora->rank; i++)
            of->narrow[i] = (float)lora->scaling * of->use->vectors->dot(lora->A + i * linear->columns, x, linear->columns);
        for (int64_t r = first; r < last; r++)
            to[r] += of->use->vectors->dot(lora->B + r * lora->rank, of->narrow, lora->rank);
    }
    if (add)
        for (int64_t r = first; r < last; r++) y[r] += to[r];
}

/* out = norm(head), where there is one, rotated by the token's angles. */
static void rotate(const Thread *of, const float *head, const float *norm, float *out) {
    const Pointwise *use = of->use->pointwise;
    const int64_t channels = of->model->channels;
    if (norm) use->norm(head, norm, (float)of->model->epsilon, channels, out);
    use->rotate(0, norm ? out : head, 0, 1, of->cos, of->sin, channels / 2, channels, out);
}

/* The thread's heads. Heads that share a key may be with several threads: each rotates it for itself, and the thread of
 * the first of them writes it down for the tokens to come, where nobody reads in this step. */
static void attend_heads(const Thread *of, const Layer *layer) {
    const Model *model = of->model;
    const int64_t channels = model->channels, heads = model->heads, shared = heads / model->groups;
    const size_t bytes = (size_t)channels * sizeof(float);
    for (int64_t h = heads * of->index / of->count; h < heads * (of->index + 1) / of->count; h++) {
        const int64_t group = h / shared, start = group * model->capacity * channels;
        float *key = of->head + channels, *keys = layer->keys + start, *values = layer->values + start;
        const float *value = of->v + group * channels;
        rotate(of, of->q + h * channels, layer->q_norm, of->head);
        rotate(of, of->k + group * channels, layer->k_norm, key);
        of->use->vectors->attend(of->head, keys, values, of->position, key, value, channels, (float)model->scale, of->scores,
                                 of->mixed + h * channels);
        if (h % shared) continue;
        memcpy(keys + of->position * channels, key, bytes);
        memcpy(values + of->position * channels, value, bytes);
    }
}

static void run_layer(const Thread *of, const Layer *layer) {
    const Model *model = of->model;
    const Pointwise *use = of->use->pointwise;
    int64_t first, last;
    use->norm(of->x, layer->attention_norm, (float)model->epsilon, model->hidden, of->normed);
    project(of, &layer->q, of->normed, of->q, NULL, 0);
    project(of, &layer->k, of->normed, of->k, NULL, 0);
    project(of, &layer->v, of->normed, of->v, NULL, 0);
    meet(of);
    attend_heads(of, layer);
    meet(of);
    project(of, &layer->o, of->mixed, of->x, of->normed, 1);
    meet(of);
    use->norm(of->x, layer->mlp_norm, (float)model->epsilon, model->hidden, of->normed);
    project(of, &layer->gate, of->normed, of->gate, NULL, 0);
    project(of, &layer->up, of->normed, of->up, NULL, 0);
    share_of(of, model->inner, &first, &last);
    if (first < last) use->gated(SILU, of->gate + first, of->up + first, last - first, of->gate + first);
    meet(of);
    project(of, &layer->down, of->gate, of->x, of->normed, 1);
    meet(of);
}

/* x [hidden]: in, the token's embedding; out, the normed last state. cos, sin [channels]: of its rotation. `position`:
 * how many keys and values there are; those of the token are written behind them. 0, or -1 for a bad size or format, -2
 * without memory. */
int qgraft_decode_step(const Model *model, float *x, const float *cos, const float *sin, int64_t position, int threads) {
    const int64_t wide = model->heads * model->channels, narrow = model->groups * model->channels;
    const int64_t codes = groups_of(largest(model->hidden, largest(wide, model->inner)));
    const int64_t own = model->hidden + model->rank + 2 * model->channels + position + 1 + (2 + 32 / sizeof(float)) * codes;
    const int64_t shared = 2 * wide + 2 * narrow + 2 * model->inner;
    if (position < 0 || position >= model->capacity || model->heads % model->groups || model->channels % 2) return -1;
    for (const Layer *layer = model->layer; layer < model->layer + model->layers; layer++)
        for (const Linear *linear = &layer->q; linear <= &layer->down; linear++)
            if (row_bytes((int)linear->format, linear->columns) < 0 || (linear->int8 && !has_int8((int)linear->format)))
                return -1;
    threads = threads > 1 ? threads : 1;
    float *memory = malloc((size_t)(shared + threads * own) * sizeof(float));
    if (!memory) return -2;
    Barrier barrier = {0, 0, 0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *q = memory, *k = q + wide, *v = k + narrow, *mixed = v + narrow, *gate = mixed + wide;
        float *mine = memory + shared + omp_get_thread_num() * own, *lora = mine + model->hidden, *head = lora + model->rank;
        float *scores = head + 2 * model->channels, *steps = scores + position + 1;
        const Thread thread = {
            model, qgraft_level(), &barrier, omp_get_thread_num(), omp_get_num_threads(),
            x, q, k, v, mixed, gate, gate + model->inner,
            mine, lora, head, scores, {(int8_t *)(steps + 2 * codes), steps, steps + codes, codes},
            cos, sin, position,
        };
        for (int64_t i = 0; i < model->layers; i++) run_layer(&thread, model->layer + i);
    }
    qgraft_level()->pointwise->norm(x, model->norm, (float)model->epsilon, model->hidden, x);
    free(memory);
    return 0;
}
