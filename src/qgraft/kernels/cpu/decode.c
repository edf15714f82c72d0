/* New tokens of some texts through a whole decoder of Llama's kind, in one call: a row for each.
 *
 *     for each layer:  n = norm(x);  q, k, v = n Wq, n Wk, n Wv;  norm of q and k by heads (Qwen3);  rotate q and k;
 *                      keep k and v;  x += attention(q) Wo;  n = norm(x);  x += (silu(n Wg) * n Wu) Wd
 *     x = norm(x)
 *
 * Each W may have a bias. Rows that follow each other and have the same LoRAs are a part: any number of LoRAs on each W, which
 * add s (n A^T) B^T. All in float32; the products with W are in 8-bit integers (gemm_int8.h) where the layer asks for it.
 *
 * A product of one row takes 20 microseconds, so calls and passes of their own for each, in Python and torch, take
 * longer than the work. Here the threads stay in one parallel region. Columns of a product, of x A^T too, rows of keys and heads of
 * attention are shared out evenly, with a barrier (barrier.h) between what reads others' shares.
 *
 * Keys and values are in slots of a memory that all texts share; a row is told those of its text.
 */

#include <stdlib.h>
#include <string.h>

#include "barrier.h"
#include "common.h"
#include "decode_thread.h"
#include "formats.h"
#include "level.h"
#include "product.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

const int64_t qgraft_decode_sizes[] = {sizeof(Linear), sizeof(DecoderLayer), sizeof(Decoder), sizeof(Lora),
                                       sizeof(Loras), sizeof(DecoderPart), sizeof(DecoderRow)};

/* The thread's share of h = s x A^T [rows, ranks], of all LoRAs on these of a layer's products, one behind the other. */
static void lower(const Thread *thread, int64_t layer, int from, int to, const float *x) {
    const int64_t columns = linear_of(thread, layer, from)->columns;
    Ranks ranks = ranks_of_thread(thread, layer, from, to);
    for (int64_t p = 0, start = 0; p < thread->parts; start += thread->part[p].rows, p++) {
        float *h = thread->h + start * thread->ranks;
        for (int which = from; which < to; which++) {
            const Loras loras = loras_of(thread->part + p, layer, which);
            for (const Lora *lora = loras.lora; lora < loras.lora + loras.count; h += lora->rank, lora++) {
                int64_t first, last;
                if (!take_ranks(&ranks, lora->rank, &first, &last)) continue;
                const Product product = {F32, (const uint8_t *)lora->A, NULL, row_bytes(F32, columns), thread->ranks, columns,
                                         first, last, thread->part[p].rows, h, NULL};
                thread->level->gemv(&product, x + start * columns);
                for (int64_t t = 0; t < product.m; t++)
                    for (int64_t i = first; i < last; i++) h[t * thread->ranks + i] *= (float)lora->scaling;
            }
        }
    }
}

/* What LoRAs add to the columns first <= r < last of y [rows, ..]; `from`: the first product that `lower` was told. */
static void add_loras(const Thread *thread, int64_t layer, int from, int which, int64_t first, int64_t last, float *y) {
    const int64_t width = linear_of(thread, layer, which)->rows;
    for (int64_t p = 0, start = 0; p < thread->parts; start += thread->part[p].rows, p++) {
        const float *h = thread->h + start * thread->ranks;
        for (int other = from; other < which; other++) {
            const Loras before = loras_of(thread->part + p, layer, other);
            for (int64_t i = 0; i < before.count; i++) h += before.lora[i].rank;
        }
        const Loras loras = loras_of(thread->part + p, layer, which);
        for (const Lora *lora = loras.lora; lora < loras.lora + loras.count; h += lora->rank, lora++)
            for (int64_t t = 0; t < thread->part[p].rows; t++)
                thread->level->decoding->add_rows(lora->B + first * lora->rank, h + t * thread->ranks, last - first, lora->rank,
                                                  y + (start + t) * width + first);
    }
}

/* The product with W, by the codes of x. */
static void multiply_codes(const Thread *thread, Product product, const float *x) {
    const Level *level = thread->level;
    const int panels = product.m >= INT8_MANY && level->gemm_int8_panels;
    const int64_t rows = product.m, most = panels ? level->block_tokens : rows;
    QuantizedX codes = thread->codes;
    codes.groups = groups_of(product.columns);
    for (int64_t t = 0; t < rows; t += most, product.y += most * product.rows) {
        product.m = smaller(most, rows - t);
        for (int64_t i = 0; i < product.m; i++)
            level->quantize_x(product.format, x + (t + i) * product.columns, product.columns, i, &codes);
        if (panels) level->gemm_int8_panels(&product, &codes);
        else level->gemm_int8(&product, &codes);
    }
}

/* The columns first <= r < last of y = x W^T + b + LoRAs; `share`: which of the thread's these are. */
static void project_columns(const Thread *thread, int64_t layer, int from, int which, int64_t first, int64_t last, Share share,
                            const float *x, float *y) {
    const Linear *linear = linear_of(thread, layer, which);
    const int64_t rows = linear->rows, stride = row_bytes((int)linear->format, linear->columns);
    Bytes runs[AHEAD];
    const Ahead ahead = ahead_of(thread, layer, which, first, last, share, runs);
    const Product product = {(int)linear->format, linear->data, linear->scales, stride, rows, linear->columns, first, last,
                             thread->rows, y, &ahead};
    if (linear->int8) multiply_codes(thread, product, x);
    else multiply(thread->level, &product, x);
    for (int64_t t = 0; linear->bias && t < thread->rows; t++)
        for (int64_t r = first; r < last; r++) y[t * rows + r] += linear->bias[r];
    if (thread->ranks) add_loras(thread, layer, from, which, first, last, y);
}

/* The thread's columns of y. Where rows have LoRAs, some at a time: their part of B, which is fetched while these are multiplied,
 * then still is in the second-level cache. */
static void project(const Thread *thread, int64_t layer, int from, int which, const float *x, float *y) {
    enum { SOME = 384 };
    int64_t first, last;
    columns_of_thread(thread, linear_of(thread, layer, which)->rows, &first, &last);
    const int64_t step = thread->ranks && !linear_of(thread, layer, which)->int8 ? SOME : larger(last - first, 1);
    for (int64_t r = first; r < last; r += step) {
        const Share share = {(r - first) / step, (last - first + step - 1) / step};
        project_columns(thread, layer, from, which, r, smaller(r + step, last), share, x, y);
    }
}

/* x += y W^T .., in the thread's columns; all of y is there, the LoRAs' h not yet. */
static void project_back(const Thread *thread, int64_t layer, int which, const float *y) {
    const int64_t hidden = thread->decoder->hidden;
    int64_t first, last;
    if (thread->ranks) {
        lower(thread, layer, which, which + 1, y);
        barrier_wait(thread->barrier, thread->count);
    }
    project(thread, layer, which, which, y, thread->normed);
    columns_of_thread(thread, hidden, &first, &last);
    for (int64_t t = 0; t < thread->rows; t++)
        for (int64_t r = first; r < last; r++) thread->x[t * hidden + r] += thread->normed[t * hidden + r];
}

/* out = norm(head), where there is one, rotated by the row's angles. */
static void rotate(const Thread *thread, int64_t row, const float *head, const float *norm, float *out) {
    const Pointwise *loops = thread->level->pointwise;
    const int64_t channels = thread->decoder->channels, at = row * channels;
    if (norm) loops->norm(head, norm, (float)thread->decoder->epsilon, channels, out);
    loops->rotate(0, norm ? out : head, 0, 1, thread->cos + at, thread->sin + at, channels / 2, channels, out);
}

/* Keys and values of the thread's rows, into their slots. */
static void keep(const Thread *thread, const DecoderLayer *layer) {
    const Decoder *decoder = thread->decoder;
    const int64_t channels = decoder->channels, width = decoder->groups * channels;
    for (int64_t t = first_row(thread); t < last_row(thread); t++)
        for (int64_t group = 0; group < decoder->groups; group++) {
            const int64_t slot = thread->row[t].slots[thread->row[t].seen - 1], from = t * width + group * channels;
            const int64_t at = (group * decoder->capacity + slot) * channels;
            rotate(thread, t, thread->k + from, layer->k_norm, layer->keys + at);
            memcpy(layer->values + at, thread->v + from, (size_t)channels * sizeof(float));
        }
}

/* The thread's share of attention: of each row the heads that share keys, or each head alone where there are few rows. */
static void attend(const Thread *thread, const DecoderLayer *layer) {
    const Decoder *decoder = thread->decoder;
    const int64_t channels = decoder->channels, heads = decoder->heads, shared = heads / decoder->groups;
    const int64_t together = thread->rows * decoder->groups >= 4 * thread->count || thread->count == 1 ? shared : 1;
    const int64_t each = heads / together, all = thread->rows * each;
    for (int64_t u = all * thread->index / thread->count; u < all * (thread->index + 1) / thread->count; u++) {
        const int64_t t = u / each, head = u % each * together, start = head / shared * decoder->capacity * channels;
        const int64_t at = (t * heads + head) * channels;
        const int64_t spans = spans_of(thread, layer, thread->row + t);
        for (int64_t i = 0; i < together; i++)
            rotate(thread, t, thread->q + at + i * channels, layer->q_norm, thread->head + i * channels);
        thread->level->decoding->attention(thread->head, together, layer->keys + start, layer->values + start, thread->spans,
                                           spans, channels, (float)decoder->scale, thread->scores, thread->attended + at);
    }
}

/* out = the rows first <= t < last of x, normed. */
static void norm_rows(const Thread *thread, int64_t first, int64_t last, const float *weight, float *out) {
    const int64_t hidden = thread->decoder->hidden;
    for (int64_t t = first; t < last; t++)
        thread->level->pointwise->norm(thread->x + t * hidden, weight, (float)thread->decoder->epsilon, hidden, out + t * hidden);
}

/* What these products of a layer read: x normed, by each thread for itself, which takes less than to wait for others; and h. */
static void prepare(const Thread *thread, int64_t layer, int from, int to, const float *weight) {
    norm_rows(thread, 0, thread->rows, weight, thread->normed);
    if (!thread->ranks) return;
    lower(thread, layer, from, to, thread->normed);
    barrier_wait(thread->barrier, thread->count);
}

static void run_layer(const Thread *thread, int64_t i) {
    const DecoderLayer *layer = thread->decoder->layer + i;
    const int64_t inner = thread->decoder->inner;
    int64_t first, last;
    prepare(thread, i, Q, O, layer->attention_norm);
    project(thread, i, Q, Q, thread->normed, thread->q);
    project(thread, i, Q, K, thread->normed, thread->k);
    project(thread, i, Q, V, thread->normed, thread->v);
    barrier_wait(thread->barrier, thread->count);
    keep(thread, layer);
    barrier_wait(thread->barrier, thread->count);
    attend(thread, layer);
    barrier_wait(thread->barrier, thread->count);
    project_back(thread, i, O, thread->attended);
    barrier_wait(thread->barrier, thread->count);
    prepare(thread, i, GATE, DOWN, layer->mlp_norm);
    project(thread, i, GATE, GATE, thread->normed, thread->gate);
    project(thread, i, GATE, UP, thread->normed, thread->up);
    columns_of_thread(thread, inner, &first, &last);
    for (int64_t t = 0; t < thread->rows && first < last; t++) {
        float *gate = thread->gate + t * inner + first;
        thread->level->pointwise->gated(SILU, gate, thread->up + t * inner + first, last - first, gate);
    }
    barrier_wait(thread->barrier, thread->count);
    project_back(thread, i, DOWN, thread->gate);
    barrier_wait(thread->barrier, thread->count);
}

/* How many numbers of h a row has at most. */
static int64_t most_ranks(const Decoder *decoder, const DecoderPart *part, int64_t parts) {
    static const int groups[][2] = {{Q, O}, {O, GATE}, {GATE, DOWN}, {DOWN, LINEARS}};
    int64_t most = 0;
    for (int64_t p = 0; p < parts; p++)
        for (int64_t i = 0; i < decoder->layers * 4; i++) {
            int64_t ranks = 0;
            for (int which = groups[i % 4][0]; which < groups[i % 4][1]; which++) {
                const Loras loras = loras_of(part + p, i / 4, which);
                for (int64_t k = 0; k < loras.count; k++) ranks += loras.lora[k].rank;
            }
            most = larger(most, ranks);
        }
    return most;
}

/* Whether every number is one that the loops can go by. */
static int is_sound(const Decoder *decoder, const DecoderPart *part, int64_t parts, const DecoderRow *row, int64_t rows) {
    int64_t left = rows;
    if (rows < 1 || decoder->heads % decoder->groups || decoder->channels % 2) return 0;
    for (int64_t p = 0; p < parts; p++) left -= part[p].rows;
    for (const DecoderRow *each = row; each < row + rows; each++) {
        if (each->seen < 1 || each->front < 0 || each->front >= each->seen) return 0;
        for (int64_t i = 0; i < each->seen; i++)
            if (each->slots[i] < 0 || each->slots[i] >= decoder->capacity) return 0;
    }
    for (const DecoderLayer *layer = decoder->layer; layer < decoder->layer + decoder->layers; layer++)
        for (const Linear *linear = &layer->q; linear <= &layer->down; linear++)
            if (row_bytes((int)linear->format, linear->columns) < 0 || (linear->int8 && !has_int8((int)linear->format)))
                return 0;
    return left == 0;
}

/* Numbers of memory: of all rows, and of each thread, whose spans come first; all that follows is a multiple of 8 bytes. */
static int64_t numbers_of_rows(const Decoder *decoder, int64_t ranks) {
    return 2 * decoder->channels * (decoder->heads + decoder->groups) + 2 * decoder->inner + ranks;
}

static int64_t groups_of_codes(const Decoder *decoder) {
    return groups_of(larger(decoder->hidden, larger(decoder->heads * decoder->channels, decoder->inner)));
}

static int64_t numbers_of_thread(const Decoder *decoder, int64_t rows, int64_t seen) {
    const int64_t shared = decoder->heads / decoder->groups, codes = rows * groups_of_codes(decoder);
    return round_up(4 * (seen + 1) + rows * decoder->hidden + shared * (decoder->channels + seen)
                    + (2 + 32 / (int64_t)sizeof(float)) * codes, 2);
}

/* A thread with its places in memory: [rows, ..] from `all` on, its own from `own` on. */
static Thread thread_of(const Decoder *decoder, int64_t rows, int64_t ranks, int64_t seen, float *all, float *own) {
    const int64_t wide = decoder->heads * decoder->channels, narrow = decoder->groups * decoder->channels;
    const int64_t codes = rows * groups_of_codes(decoder), shared = decoder->heads / decoder->groups;
    float *places[] = {all, 0, 0, 0, 0, 0, 0}, *normed = own + 4 * (seen + 1), *head = normed + rows * decoder->hidden;
    const int64_t sizes[] = {wide, narrow, narrow, wide, decoder->inner, decoder->inner};
    float *scores = head + shared * decoder->channels, *steps = scores + shared * seen;
    for (int i = 0; i < 6; i++) places[i + 1] = places[i] + rows * sizes[i];
    return (Thread){
        .decoder = decoder, .rows = rows, .ranks = ranks, .level = qgraft_level(),
        .index = omp_get_thread_num(), .count = omp_get_num_threads(),
        .q = places[0], .k = places[1], .v = places[2], .attended = places[3], .gate = places[4], .up = places[5],
        .h = places[6], .normed = normed, .head = head, .scores = scores, .spans = (int64_t *)own,
        .codes = {(int8_t *)(steps + 2 * codes), steps, steps + codes, 0},
    };
}

/* x [rows, hidden]: in, the tokens' embeddings; out, the normed last states. cos, sin [rows, channels]: of their rotations.
 * Rows of one text may see each other. 0, or -1 for a bad size, slot or format, -2 without memory. */
int qgraft_decode_rows(const Decoder *decoder, const DecoderPart *part, int64_t parts, const DecoderRow *row, int64_t rows,
                       float *x, const float *cos, const float *sin, int threads) {
    if (!is_sound(decoder, part, parts, row, rows)) return -1;
    const int64_t ranks = most_ranks(decoder, part, parts), all = round_up(rows * numbers_of_rows(decoder, ranks), 2);
    int64_t seen = 0;
    for (int64_t t = 0; t < rows; t++) seen = larger(seen, row[t].seen);
    const int64_t own = numbers_of_thread(decoder, rows, seen);
    threads = threads > 1 ? threads : 1;
    float *memory = malloc((size_t)(all + threads * own) * sizeof(float));
    if (!memory) return -2;
    Barrier barrier = {0, 0, 0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Thread thread = thread_of(decoder, rows, ranks, seen, memory, memory + all + omp_get_thread_num() * own);
        thread.part = part, thread.parts = parts, thread.row = row, thread.barrier = &barrier;
        thread.x = x, thread.cos = cos, thread.sin = sin;
        for (int64_t i = 0; i < decoder->layers; i++) run_layer(&thread, i);
        norm_rows(&thread, first_row(&thread), last_row(&thread), decoder->norm, x);
    }
    free(memory);
    return 0;
}
