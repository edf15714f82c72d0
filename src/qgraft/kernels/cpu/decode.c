/* New tokens of some texts through a whole decoder of Llama's kind, in one call: a row for each.
 *
 *     for each layer:  n = norm(x);  q, k, v = n Wq, n Wk, n Wv;  norm of q and k by heads (Qwen3);  rotate q and k;
 *                      keep k and v;  x += attention(q) Wo;  n = norm(x);  x += (silu(n Wg) * n Wu) Wd
 *     x = norm(x)
 *
 * Instead of the last sum, or beside it, a layer may have experts, of which each row goes to a few (decode_experts.h).
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
#include "decode_experts.h"
#include "decode_product.h"
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

const int64_t qgraft_decode_sizes[] = {sizeof(Linear), sizeof(Experts), sizeof(DecoderLayer), sizeof(Decoder),
                                       sizeof(Lora), sizeof(Loras), sizeof(DecoderPart), sizeof(DecoderRow)};

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

/* The columns first <= r < last of y = x W^T + b + LoRAs; `share`: which of the thread's these are. */
static void project_columns(const Thread *thread, int64_t layer, int from, int which, int64_t first, int64_t last, Share share,
                            const float *x, float *y) {
    const Linear *linear = linear_of(thread, layer, which);
    Bytes runs[AHEAD];
    const Ahead ahead = ahead_of(thread, layer, which, first, last, share, runs);
    Product product = product_of(linear, 0, first, last, thread->rows, y);
    product.ahead = &ahead;
    multiply_rows(thread, (int)linear->int8, &product, x);
    for (int64_t t = 0; linear->bias && t < thread->rows; t++)
        for (int64_t r = first; r < last; r++) y[t * linear->rows + r] += linear->bias[r];
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

/* x += thread->normed, each row times sigmoid(its factor) where there are some, in the thread's columns. */
static void add_normed(const Thread *thread, const float *factors) {
    const int64_t hidden = thread->decoder->hidden;
    int64_t first, last;
    columns_of_thread(thread, hidden, &first, &last);
    for (int64_t t = 0; t < thread->rows; t++) {
        const float factor = (float)thread->decoder->residual * (factors ? sigmoid(factors[t]) : 1.0f);
        for (int64_t r = first; r < last; r++) thread->x[t * hidden + r] += factor * thread->normed[t * hidden + r];
    }
}

/* x += y W^T .., in the thread's columns; all of y is there, the LoRAs' h not yet. */
static void project_back(const Thread *thread, int64_t layer, int which, const float *y, const float *factors) {
    if (thread->ranks) {
        lower(thread, layer, which, which + 1, y);
        barrier_wait(thread->barrier, thread->count);
    }
    project(thread, layer, which, which, y, thread->normed);
    add_normed(thread, factors);
}

/* Each pair of neighbours (x[2 j], x[2 j + 1]) by its angle; what is behind the rotated channels is copied. */
static void rotate_pairs(const Decoder *decoder, const float *x, const float *cos, const float *sin, float *out) {
    for (int64_t j = 0; j < decoder->rotated / 2; j++) {
        const float a = x[2 * j], b = x[2 * j + 1];
        out[2 * j] = a * cos[j] - b * sin[j], out[2 * j + 1] = b * cos[j] + a * sin[j];
    }
    for (int64_t j = decoder->rotated; j < decoder->channels; j++) out[j] = x[j];
}

/* out = norm(head), where it has one of its own, rotated by the row's angles. */
static void rotate(const Thread *thread, int64_t row, const float *head, const float *norm, float *out) {
    const Pointwise *loops = thread->level->pointwise;
    const Decoder *decoder = thread->decoder;
    const int64_t channels = decoder->channels, rotated = decoder->rotated;
    const float *cos = thread->cos + row * rotated, *sin = thread->sin + row * rotated;
    if (norm && !decoder->wide_norms) loops->norm(head, norm, (float)decoder->epsilon, channels, out), head = out;
    if (decoder->pairs) rotate_pairs(decoder, head, cos, sin, out);
    else loops->rotate(0, head, 0, 1, cos, sin, rotated / 2, channels, out);
}

/* Keys and values of the thread's rows, into their slots; before that norms of all heads of queries and keys together. */
static void keep(const Thread *thread, const DecoderLayer *layer) {
    const Decoder *decoder = thread->decoder;
    const int64_t channels = decoder->channels, width = decoder->groups * channels, wide = decoder->heads * channels;
    for (int64_t t = first_row(thread); t < last_row(thread); t++) {
        float *q = thread->q + t * wide, *k = thread->k + t * width;
        if (decoder->wide_norms) {
            thread->level->pointwise->norm(q, layer->q_norm, (float)decoder->epsilon, wide, q);
            thread->level->pointwise->norm(k, layer->k_norm, (float)decoder->epsilon, width, k);
        }
        for (int64_t group = 0; group < decoder->groups; group++) {
            const int64_t slot = thread->row[t].slots[thread->row[t].seen - 1], from = group * channels;
            const int64_t at = (group * decoder->capacity + slot) * channels;
            rotate(thread, t, k + from, layer->k_norm, layer->keys + at);
            memcpy(layer->values + at, thread->v + t * width + from, (size_t)channels * sizeof(float));
        }
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
                                           spans, channels, (float)decoder->scale, layer->sinks ? layer->sinks + head : NULL,
                                           thread->scores, thread->attended + at);
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

/* The thread's columns of what is between gate and down. */
static void open_dense(const Thread *thread, int64_t i) {
    const int64_t inner = linear_of(thread, i, GATE)->rows;
    int64_t first, last;
    project(thread, i, GATE, GATE, thread->normed, thread->gate);
    project(thread, i, GATE, UP, thread->normed, thread->up);
    if (thread->decoder->layer[i].shared_gate.data) project(thread, i, GATE, SHARED_GATE, thread->normed, thread->factors);
    columns_of_thread(thread, inner, &first, &last);
    for (int64_t t = 0; t < thread->rows && first < last; t++) {
        float *gate = thread->gate + t * inner + first;
        thread->level->pointwise->gated(SILU, gate, thread->up + t * inner + first, last - first, gate);
    }
}

static void run_layer(const Thread *thread, int64_t i) {
    const DecoderLayer *layer = thread->decoder->layer + i;
    const Experts *experts = layer->experts;
    prepare(thread, i, Q, O, layer->attention_norm);
    project(thread, i, Q, Q, thread->normed, thread->q);
    project(thread, i, Q, K, thread->normed, thread->k);
    project(thread, i, Q, V, thread->normed, thread->v);
    barrier_wait(thread->barrier, thread->count);
    keep(thread, layer);
    barrier_wait(thread->barrier, thread->count);
    attend(thread, layer);
    barrier_wait(thread->barrier, thread->count);
    project_back(thread, i, O, thread->attended, NULL);
    barrier_wait(thread->barrier, thread->count);
    prepare(thread, i, GATE, DOWN, layer->mlp_norm);
    if (experts) score_experts(thread, experts);
    if (layer->gate.data) open_dense(thread, i);
    if (experts) {
        barrier_wait(thread->barrier, thread->count);
        open_experts(thread, i, experts);
    }
    barrier_wait(thread->barrier, thread->count);
    if (experts) {
        close_experts(thread, i, experts);
        add_normed(thread, NULL);
    }
    if (layer->gate.data) project_back(thread, i, DOWN, thread->gate, layer->shared_gate.data ? thread->factors : NULL);
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

/* Whether these numbers are ones that the loops can go by. */
static int is_sound_linear(const Linear *linear) {
    return row_bytes((int)linear->format, linear->columns) >= 0 && (!linear->int8 || has_int8((int)linear->format));
}

static int is_sound_layer(const Decoder *decoder, const DecoderLayer *layer) {
    const Experts *experts = layer->experts;
    for (const Linear *linear = &layer->q; linear <= &layer->down; linear++)
        if (!is_sound_linear(linear)) return 0;
    if (decoder->wide_norms && !(layer->q_norm && layer->k_norm)) return 0;
    if (layer->gate.rows > decoder->inner || layer->shared_gate.rows > 1) return 0;
    if (!experts) return layer->gate.data != NULL;
    for (const Linear *linear = &experts->gate; linear <= &experts->down; linear++)
        if (!is_sound_linear(linear)) return 0;
    return is_sound_mixture(experts, decoder->hidden);
}

static int is_sound(const Decoder *decoder, const DecoderPart *part, int64_t parts, const DecoderRow *row, int64_t rows) {
    int64_t left = rows;
    if (rows < 1 || decoder->heads % decoder->groups) return 0;
    if (decoder->rotated % 2 || decoder->rotated < 0 || decoder->rotated > decoder->channels) return 0;
    for (int64_t p = 0; p < parts; p++) left -= part[p].rows;
    for (const DecoderRow *each = row; each < row + rows; each++) {
        if (each->seen < 1 || each->front < 0 || each->front >= each->seen) return 0;
        for (int64_t i = 0; i < each->seen; i++)
            if (each->slots[i] < 0 || each->slots[i] >= decoder->capacity) return 0;
    }
    for (int64_t i = 0; i < decoder->layers; i++)
        if (!is_sound_layer(decoder, decoder->layer + i)) return 0;
    return left == 0;
}

/* What memory is needed for: rows, ranks of a row, slots that one sees at most, and the largest numbers of a layer's experts. */
typedef struct {
    int64_t rows, ranks, seen, experts, chosen, routed, rank;
} Sizes;

static Sizes sizes_of(const Decoder *decoder, const DecoderPart *part, int64_t parts, const DecoderRow *row, int64_t rows) {
    Sizes sizes = {rows, most_ranks(decoder, part, parts), 0, 0, 0, 0, 0};
    for (int64_t t = 0; t < rows; t++) sizes.seen = larger(sizes.seen, row[t].seen);
    for (int64_t i = 0; i < decoder->layers; i++) {
        const Experts *experts = decoder->layer[i].experts;
        if (!experts) continue;
        sizes.experts = larger(sizes.experts, experts->experts);
        sizes.chosen = larger(sizes.chosen, experts->chosen);
        sizes.routed = larger(sizes.routed, experts->gate.rows);
        for (int64_t j = 0; j < parts * (ADAPTED - LINEARS); j++) {
            const Loras loras = loras_of(part + j / (ADAPTED - LINEARS), i, LINEARS + (int)(j % (ADAPTED - LINEARS)));
            for (int64_t k = 0; k < loras.count; k++) sizes.rank = larger(sizes.rank, loras.lora[k].rank);
        }
    }
    return sizes;
}

/* The arrays that threads share, [rows, ..], and those of one thread: of int64_t in front, so that each may lie where it does. */
enum { OF_Q, OF_K, OF_V, OF_ATTENDED, OF_GATE, OF_UP, OF_LOGITS, OF_ROUTED_GATE, OF_ROUTED_UP, OF_FACTORS, OF_H, ALL_ARRAYS };
enum { SPANS, CHOSEN, ORDER, ENDS, NORMED, GATHERED, SHARES, CHOICE, LOW, HEAD, SEEN, STEPS, SUMS, CODES, OWN_ARRAYS };

/* How many floats each of them takes, and all together, so that 8 bytes may begin behind them. */
static int64_t numbers_of_all(const Decoder *decoder, const Sizes *sizes, int64_t numbers[ALL_ARRAYS]) {
    const int64_t wide = decoder->heads * decoder->channels, narrow = decoder->groups * decoder->channels;
    const int64_t routed = sizes->chosen * sizes->routed;
    const int64_t each[ALL_ARRAYS] = {
        [OF_Q] = wide, [OF_K] = narrow, [OF_V] = narrow, [OF_ATTENDED] = wide, [OF_GATE] = decoder->inner,
        [OF_UP] = decoder->inner, [OF_LOGITS] = sizes->experts, [OF_ROUTED_GATE] = routed, [OF_ROUTED_UP] = routed,
        [OF_FACTORS] = 1, [OF_H] = sizes->ranks,
    };
    int64_t sum = 0;
    for (int i = 0; i < ALL_ARRAYS; i++) sum += numbers[i] = sizes->rows * each[i];
    return round_up(sum, 2);
}

static int64_t numbers_of_own(const Decoder *decoder, const Sizes *sizes, int64_t numbers[OWN_ARRAYS]) {
    const int64_t rows = sizes->rows, shared = decoder->heads / decoder->groups, choices = rows * sizes->chosen;
    const int64_t widest = larger(larger(decoder->hidden, decoder->heads * decoder->channels), larger(decoder->inner, sizes->routed));
    const int64_t codes = rows * groups_of(widest);
    const int64_t each[OWN_ARRAYS] = {
        [SPANS] = 4 * (sizes->seen + 1), [CHOSEN] = 2 * choices, [ORDER] = 2 * choices, [ENDS] = 2 * sizes->experts,
        [NORMED] = rows * decoder->hidden, [GATHERED] = sizes->experts ? rows * decoder->hidden : 0, [SHARES] = choices,
        [CHOICE] = 3 * sizes->experts, [LOW] = rows * sizes->rank, [HEAD] = shared * decoder->channels,
        [SEEN] = shared * sizes->seen, [STEPS] = codes, [SUMS] = codes, [CODES] = codes * (32 / (int64_t)sizeof(float)),
    };
    int64_t sum = 0;
    for (int i = 0; i < OWN_ARRAYS; i++) sum += numbers[i] = each[i];
    return round_up(sum, 2);
}

/* Where `count` arrays of so many numbers begin that lie one behind the other. */
static void lay_out(float *memory, const int64_t *numbers, int count, float **arrays) {
    for (int i = 0; i < count; memory += numbers[i++]) arrays[i] = memory;
}

/* A thread with its places in memory: what all share at `all`, its own at `own`. */
static Thread thread_of(const Decoder *decoder, const Sizes *sizes, float *all, float *own) {
    int64_t of_all[ALL_ARRAYS], of_own[OWN_ARRAYS];
    float *a[ALL_ARRAYS], *o[OWN_ARRAYS];
    numbers_of_all(decoder, sizes, of_all), numbers_of_own(decoder, sizes, of_own);
    lay_out(all, of_all, ALL_ARRAYS, a), lay_out(own, of_own, OWN_ARRAYS, o);
    return (Thread){
        .decoder = decoder, .rows = sizes->rows, .ranks = sizes->ranks, .level = qgraft_level(),
        .index = omp_get_thread_num(), .count = omp_get_num_threads(),
        .q = a[OF_Q], .k = a[OF_K], .v = a[OF_V], .attended = a[OF_ATTENDED], .gate = a[OF_GATE], .up = a[OF_UP],
        .logits = a[OF_LOGITS], .routed_gate = a[OF_ROUTED_GATE], .routed_up = a[OF_ROUTED_UP],
        .factors = a[OF_FACTORS], .h = a[OF_H],
        .spans = (int64_t *)o[SPANS], .chosen = (int64_t *)o[CHOSEN], .order = (int64_t *)o[ORDER],
        .ends = (int64_t *)o[ENDS], .normed = o[NORMED], .gathered = o[GATHERED], .shares = o[SHARES], .choice = o[CHOICE], .low = o[LOW], .head = o[HEAD], .scores = o[SEEN],
        .codes = {(int8_t *)o[CODES], o[STEPS], o[SUMS], 0},
    };
}

/* x [rows, hidden]: in, the tokens' embeddings; out, the normed last states. cos, sin [rows, rotated]: of their rotations.
 * Rows of one text may see each other. 0, or -1 for a bad size, slot or format, -2 without memory. */
int qgraft_decode_rows(const Decoder *decoder, const DecoderPart *part, int64_t parts, const DecoderRow *row, int64_t rows,
                       float *x, const float *cos, const float *sin, int threads) {
    if (!is_sound(decoder, part, parts, row, rows)) return -1;
    const Sizes sizes = sizes_of(decoder, part, parts, row, rows);
    int64_t of_all[ALL_ARRAYS], of_own[OWN_ARRAYS];
    const int64_t all = numbers_of_all(decoder, &sizes, of_all), own = numbers_of_own(decoder, &sizes, of_own);
    threads = threads > 1 ? threads : 1;
    float *memory = malloc((size_t)(all + threads * own) * sizeof(float));
    if (!memory) return -2;
    Barrier barrier = {0, 0, 0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Thread thread = thread_of(decoder, &sizes, memory, memory + all + omp_get_thread_num() * own);
        thread.part = part, thread.parts = parts, thread.row = row, thread.barrier = &barrier;
        thread.x = x, thread.cos = cos, thread.sin = sin;
        for (int64_t i = 0; i < decoder->layers; i++) run_layer(&thread, i);
        norm_rows(&thread, first_row(&thread), last_row(&thread), decoder->norm, x);
    }
    free(memory);
    return 0;
}
