/* One token of one sequence through a whole decoder of Llama's kind, in one call.
 *
 *     for each layer:  n = norm(x);  q, k, v = n Wq, n Wk, n Wv;  norm of q and k by heads (Qwen3);  rotate q and k;
 *                      append k and v;  x += attention(q) Wo;  n = norm(x);  x += (silu(n Wg) * n Wu) Wd
 *     x = norm(x)
 *
 * Each W may have a bias and any number of LoRAs. All in float32, the products of a single row of gemv.h; those with W
 * are in 8-bit integers (gemm_int8.h) where the layer asks for it.
 *
 * A product of one row takes 20 microseconds, so calls and passes of their own for each, in Python and torch, take
 * longer than the work. Here the threads stay in one parallel region. Rows of W, or heads, are shared out evenly, and
 * there are five barriers (barrier.h) in a layer; what is cheap (norms, x A^T of a LoRA, the rotated key) each thread
 * computes for itself instead of waiting for another one.
 */

#include <stdlib.h>
#include <string.h>

#include "barrier.h"
#include "common.h"
#include "formats.h"
#include "level.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

/* As the structures of abi.py, field by field. */
typedef struct {
    const float *A, *B; /* [rank, columns], [rows, rank] */
    int64_t rank;
    double scaling;
} Lora;

typedef struct {
    int64_t format, rows, columns, int8, loras; /* int8: x is rounded to 8 bits (quantize_x.h) */
    const uint8_t *data;
    const float *scales, *bias; /* [rows] or NULL */
    const Lora *lora;           /* [loras] */
} Linear;

typedef struct {
    Linear q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm; /* [hidden] */
    const float *q_norm, *k_norm;           /* [channels] or NULL */
    float *keys, *values;                   /* [groups, capacity, channels] */
} DecoderLayer;

typedef struct {
    int64_t layers, hidden, inner, heads, groups, channels, rank, capacity; /* rank: of the largest LoRA */
    double epsilon, scale;
    const float *norm;
    const DecoderLayer *layer;
} Decoder;

const int64_t qgraft_decode_sizes[] = {sizeof(Lora), sizeof(Linear), sizeof(DecoderLayer), sizeof(Decoder)};

/* What one thread knows. */
typedef struct {
    const Decoder *decoder;
    const Level *level;
    Barrier *barrier;
    int64_t index, count;
    float *x;                                /* [hidden] */
    float *q, *k, *v, *attended, *gate, *up; /* shared by the threads */
    float *normed, *lora_h, *head, *scores;  /* its own */
    QuantizedX codes;                        /* its own */
    const float *cos, *sin;                  /* [channels] */
    int64_t position;
} Thread;

/* The thread's share of `n`, in whole tiles of 8 rows. */
static void rows_of_thread(const Thread *thread, int64_t n, int64_t *first, int64_t *last) {
    const int64_t tiles = (n + 7) / 8;
    *first = 8 * (tiles * thread->index / thread->count), *last = 8 * (tiles * (thread->index + 1) / thread->count);
    if (*last > n) *last = n;
}

/* The thread's rows of y = W x + b + LoRAs; added to y where `add`. */
static void project(const Thread *thread, const Linear *linear, const float *x, float *y, float *scratch, int add) {
    const Level *level = thread->level;
    const int64_t rows = linear->rows, columns = linear->columns, stride = row_bytes((int)linear->format, columns);
    int64_t first, last;
    rows_of_thread(thread, rows, &first, &last);
    if (first >= last) return;
    float *to = add ? scratch : y, *h = thread->lora_h;
    const Product product = {(int)linear->format, linear->data, linear->scales, stride, rows, columns, first, last, 1, to};
    if (linear->int8) {
        const QuantizedX codes = {thread->codes.codes, thread->codes.steps, thread->codes.sums, groups_of(columns)};
        level->quantize_x(product.format, x, columns, 0, &codes);
        level->gemm_int8(&product, &codes);
    } else level->gemv(&product, x);
    if (linear->bias)
        for (int64_t r = first; r < last; r++) to[r] += linear->bias[r];
    for (const Lora *lora = linear->lora; lora < linear->lora + linear->loras; lora++) {
        const Product down = {F32, (const uint8_t *)lora->A, NULL, row_bytes(F32, columns), lora->rank, columns, 0, lora->rank,
                              1, h};
        level->gemv(&down, x);
        for (int64_t i = 0; i < lora->rank; i++) h[i] *= (float)lora->scaling;
        level->decoding->add_rows(lora->B + first * lora->rank, h, last - first, lora->rank, to + first);
    }
    if (add)
        for (int64_t r = first; r < last; r++) y[r] += to[r];
}

/* out = norm(head), where there is one, rotated by the token's angles. */
static void rotate(const Thread *thread, const float *head, const float *norm, float *out) {
    const Pointwise *loops = thread->level->pointwise;
    const int64_t channels = thread->decoder->channels;
    if (norm) loops->norm(head, norm, (float)thread->decoder->epsilon, channels, out);
    loops->rotate(0, norm ? out : head, 0, 1, thread->cos, thread->sin, channels / 2, channels, out);
}

/* The thread's heads. Heads that share a key may be with several threads: each rotates it for itself, and the thread of
 * the first of them writes it down for the tokens to come, where nobody reads in this step. */
static void attend(const Thread *thread, const DecoderLayer *layer) {
    const Decoder *decoder = thread->decoder;
    const int64_t channels = decoder->channels, heads = decoder->heads, shared = heads / decoder->groups;
    const size_t bytes = (size_t)channels * sizeof(float);
    for (int64_t h = heads * thread->index / thread->count; h < heads * (thread->index + 1) / thread->count; h++) {
        const int64_t group = h / shared, start = group * decoder->capacity * channels;
        float *key = thread->head + channels, *keys = layer->keys + start, *values = layer->values + start;
        const float *value = thread->v + group * channels;
        rotate(thread, thread->q + h * channels, layer->q_norm, thread->head);
        rotate(thread, thread->k + group * channels, layer->k_norm, key);
        thread->level->decoding->attention(thread->head, keys, values, thread->position, key, value, channels,
                                           (float)decoder->scale, thread->scores, thread->attended + h * channels);
        if (h % shared) continue;
        memcpy(keys + thread->position * channels, key, bytes);
        memcpy(values + thread->position * channels, value, bytes);
    }
}

static void run_layer(const Thread *thread, const DecoderLayer *layer) {
    const Decoder *decoder = thread->decoder;
    const Pointwise *loops = thread->level->pointwise;
    int64_t first, last;
    loops->norm(thread->x, layer->attention_norm, (float)decoder->epsilon, decoder->hidden, thread->normed);
    project(thread, &layer->q, thread->normed, thread->q, NULL, 0);
    project(thread, &layer->k, thread->normed, thread->k, NULL, 0);
    project(thread, &layer->v, thread->normed, thread->v, NULL, 0);
    barrier_wait(thread->barrier, thread->count);
    attend(thread, layer);
    barrier_wait(thread->barrier, thread->count);
    project(thread, &layer->o, thread->attended, thread->x, thread->normed, 1);
    barrier_wait(thread->barrier, thread->count);
    loops->norm(thread->x, layer->mlp_norm, (float)decoder->epsilon, decoder->hidden, thread->normed);
    project(thread, &layer->gate, thread->normed, thread->gate, NULL, 0);
    project(thread, &layer->up, thread->normed, thread->up, NULL, 0);
    rows_of_thread(thread, decoder->inner, &first, &last);
    if (first < last) loops->gated(SILU, thread->gate + first, thread->up + first, last - first, thread->gate + first);
    barrier_wait(thread->barrier, thread->count);
    project(thread, &layer->down, thread->gate, thread->x, thread->normed, 1);
    barrier_wait(thread->barrier, thread->count);
}

/* x [hidden]: in, the token's embedding; out, the normed last state. cos, sin [channels]: of its rotation. `position`:
 * how many keys and values there are; those of the token are written behind them. 0, or -1 for a bad size or format, -2
 * without memory. */
int qgraft_decode_step(const Decoder *decoder, float *x, const float *cos, const float *sin, int64_t position, int threads) {
    const int64_t wide = decoder->heads * decoder->channels, narrow = decoder->groups * decoder->channels;
    const int64_t codes = groups_of(larger(decoder->hidden, larger(wide, decoder->inner)));
    const int64_t floats_of_codes = (2 + 32 / sizeof(float)) * codes;
    const int64_t own = decoder->hidden + decoder->rank + 2 * decoder->channels + position + 1 + floats_of_codes;
    const int64_t shared = 2 * wide + 2 * narrow + 2 * decoder->inner;
    if (position < 0 || position >= decoder->capacity) return -1;
    if (decoder->heads % decoder->groups || decoder->channels % 2) return -1;
    for (const DecoderLayer *layer = decoder->layer; layer < decoder->layer + decoder->layers; layer++)
        for (const Linear *linear = &layer->q; linear <= &layer->down; linear++)
            if (row_bytes((int)linear->format, linear->columns) < 0 || (linear->int8 && !has_int8((int)linear->format)))
                return -1;
    threads = threads > 1 ? threads : 1;
    float *memory = malloc((size_t)(shared + threads * own) * sizeof(float));
    if (!memory) return -2;
    Barrier barrier = {0, 0, 0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *q = memory, *k = q + wide, *v = k + narrow, *attended = v + narrow, *gate = attended + wide;
        float *mine = memory + shared + omp_get_thread_num() * own, *lora_h = mine + decoder->hidden;
        float *head = lora_h + decoder->rank, *scores = head + 2 * decoder->channels, *steps = scores + position + 1;
        const Thread thread = {
            decoder, qgraft_level(), &barrier, omp_get_thread_num(), omp_get_num_threads(),
            x, q, k, v, attended, gate, gate + decoder->inner,
            mine, lora_h, head, scores, {(int8_t *)(steps + 2 * codes), steps, steps + codes, codes},
            cos, sin, position,
        };
        for (int64_t i = 0; i < decoder->layers; i++) run_layer(&thread, decoder->layer + i);
    }
    qgraft_level()->pointwise->norm(x, decoder->norm, (float)decoder->epsilon, decoder->hidden, x);
    free(memory);
    return 0;
}
