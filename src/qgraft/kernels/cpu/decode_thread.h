/* What a step of decode.c goes by: the structures that Python fills in, what one thread knows, and what it fetches ahead. */

#ifndef QGRAFT_DECODE_THREAD_H
#define QGRAFT_DECODE_THREAD_H

#include <stdint.h>

#include "barrier.h"
#include "common.h"
#include "formats.h"
#include "level.h"

/* As the structures of abi.py, field by field. */
typedef struct {
    int64_t format, rows, columns, int8; /* int8: x is rounded to 8 bits (quantize_x.h) */
    const uint8_t *data;
    const float *scales, *bias; /* [rows] or NULL */
} Linear;

/* A mixture of experts (decode_experts.h). Linears are of all of them, one behind the other, `rows` of one. */
typedef struct {
    Linear gate, up, down;
    const float *gate_bias, *up_bias;   /* of number r of expert e: at 2 e rows + r bias_step, or NULL */
    const float *router, *router_bias;  /* [experts, hidden], [experts] or NULL */
    const float *correction;            /* [experts], what is added to scores to choose by, or NULL */
    int64_t bias_step, experts, chosen, scores, expert_groups, kept_groups, normalized, clamped;
    double least_sum, added_to_sum, scaling; /* of the scores of the chosen experts */
    double limit, alpha;                     /* of a clamped gate */
} Experts;

typedef struct {
    Linear q, k, v, o;
    Linear gate, up, shared_gate, down;     /* without data: none. shared_gate [1, hidden] weights what comes out of down */
    const float *attention_norm, *mlp_norm; /* [hidden] */
    const float *q_norm, *k_norm;           /* [channels], or of all heads (wide_norms), or NULL */
    const float *sinks;                     /* [heads], scores of nothing that each head sees, or NULL */
    float *keys, *values;                   /* [groups, capacity, channels] */
    const Experts *experts;                 /* or NULL */
    int64_t window;                         /* of how many tokens the last one sees, itself among them; 0: of all */
} DecoderLayer;

typedef struct {
    int64_t layers, hidden, inner, heads, groups, channels, capacity;
    int64_t rotated, pairs, wide_norms; /* the first channels of a head; of neighbours; norms of all heads together */
    double epsilon, scale, residual;    /* residual: what is added to x is multiplied by it */
    const float *norm;
    const DecoderLayer *layer;
} Decoder;

typedef struct {
    const float *A, *B; /* [rank, columns], [rows, rank]; of each expert, those of B `step` numbers apart */
    int64_t rank, step;
    double scaling;
} Lora;

typedef struct {
    int64_t count;
    const Lora *lora;
} Loras;

typedef struct {
    const Loras *loras; /* [layers, ADAPTED], in the order of a layer's products; NULL for none */
    int64_t rows;
} DecoderPart;

typedef struct {
    const int64_t *slots;  /* of the keys of its text, in their order */
    int64_t seen, front; /* how many it sees, its own the last; those in front are a prefix's, which no window hides */
} DecoderRow;

enum { Q, K, V, O, GATE, UP, SHARED_GATE, DOWN, LINEARS, EXPERT_GATE = LINEARS, EXPERT_UP, EXPERT_DOWN, ADAPTED };
enum { AHEAD = 512 };

/* What one thread knows. */
typedef struct {
    const Decoder *decoder;
    const DecoderPart *part;
    const DecoderRow *row;
    const Level *level;
    Barrier *barrier;
    int64_t index, count, parts, rows, ranks;
    float *x, *q, *k, *v, *attended, *gate, *up, *h; /* [rows, ..], shared by the threads; h [rows, ranks] */
    float *logits, *routed_gate, *routed_up;         /* likewise: [rows, experts], [rows chosen, inner of an expert] */
    float *factors;                                  /* [rows], of what comes out of down */
    const float *cos, *sin;                          /* [rows, rotated] */
    float *normed, *head, *scores;                   /* its own; normed [rows, hidden] */
    float *gathered, *shares, *choice, *low;         /* [rows, hidden], [rows, chosen], [3, experts], [rows, rank] */
    int64_t *spans, *chosen, *order, *ends;          /* chosen, order [rows, chosen]; ends [experts] */
    QuantizedX codes;
} Thread;

static const Linear *linear_of(const Thread *thread, int64_t layer, int which) {
    return &thread->decoder->layer[layer].q + which;
}

static Loras loras_of(const DecoderPart *part, int64_t layer, int which) {
    return part->loras ? part->loras[layer * ADAPTED + which] : (Loras){0, NULL};
}

/* The thread's share of the columns of y, in whole tiles of 8. */
static void columns_of_thread(const Thread *thread, int64_t n, int64_t *first, int64_t *last) {
    const int64_t tiles = (n + 7) / 8;
    *first = 8 * (tiles * thread->index / thread->count), *last = 8 * (tiles * (thread->index + 1) / thread->count);
    if (*last > n) *last = n;
}

static int64_t first_row(const Thread *thread) { return thread->rows * thread->index / thread->count; }
static int64_t last_row(const Thread *thread) { return thread->rows * (thread->index + 1) / thread->count; }

/* The slots of the keys first <= i < last, as (slot, how many follow each other) behind `count` such pairs; how many pairs. */
static int64_t find_spans(const int64_t *slots, int64_t first, int64_t last, int64_t *spans, int64_t count) {
    for (int64_t i = first; i < last; i++) {
        int64_t *span = spans + 2 * (count - 1);
        if (count && span[0] + span[1] == slots[i]) span[1]++;
        else span[2] = slots[i], span[3] = 1, count++;
    }
    return count;
}

/* The slots that a row sees in a layer, as such pairs; how many. */
static int64_t spans_of(const Thread *thread, const DecoderLayer *layer, const DecoderRow *row) {
    const int64_t hidden = layer->window ? larger(row->seen - row->front - layer->window, 0) : 0;
    const int64_t front = find_spans(row->slots, 0, row->front, thread->spans, 0);
    return find_spans(row->slots, row->front + hidden, row->seen, thread->spans, front);
}

/* A thread's share of the rows of A of several LoRAs, one behind the other, in tiles of 4: first <= tile < last; `at`: the next. */
typedef struct {
    int64_t first, last, at;
} Ranks;

enum { TILE_OF_RANKS = 4 }; /* rows that gemv takes at a time */

/* Of all LoRAs on these of a layer's products. */
static Ranks ranks_of_thread(const Thread *thread, int64_t layer, int from, int to) {
    int64_t tiles = 0;
    for (int64_t p = 0; p < thread->parts; p++)
        for (int which = from; which < to; which++) {
            const Loras loras = loras_of(thread->part + p, layer, which);
            for (int64_t i = 0; i < loras.count; i++) tiles += (loras.lora[i].rank + TILE_OF_RANKS - 1) / TILE_OF_RANKS;
        }
    return (Ranks){tiles * thread->index / thread->count, tiles * (thread->index + 1) / thread->count, 0};
}

/* Goes past the next LoRA; which rows of its A are the thread's, and whether any are. */
static int take_ranks(Ranks *ranks, int64_t rank, int64_t *first, int64_t *last) {
    const int64_t tiles = (rank + TILE_OF_RANKS - 1) / TILE_OF_RANKS;
    *first = TILE_OF_RANKS * larger(ranks->first - ranks->at, 0);
    *last = smaller(TILE_OF_RANKS * smaller(ranks->last - ranks->at, tiles), rank);
    ranks->at += tiles;
    return *first < *last;
}

/* Notes as many bytes as there is room for. */
static void note(Ahead *ahead, const float *from, int64_t numbers) {
    if (ahead->count < AHEAD) ahead->runs[ahead->count++] = (Bytes){from, numbers * (int64_t)sizeof(float)};
}

/* Which share of something: number `index` of `count`. */
typedef struct {
    int64_t index, count;
} Share;

/* Keys, or values, that the thread's rows will see in a layer; once of each text. */
static void note_memory(const Thread *thread, const DecoderLayer *layer, Share share, const float *memory, Ahead *ahead) {
    const Decoder *decoder = thread->decoder;
    for (int64_t t = first_row(thread); t < last_row(thread); t++) {
        if (t % share.count != share.index) continue;
        if (t + 1 < thread->rows && thread->row[t + 1].slots == thread->row[t].slots) continue;
        const int64_t count = spans_of(thread, layer, thread->row + t), *spans = thread->spans;
        for (int64_t i = 0; i < decoder->groups * count; i++) {
            const int64_t *span = spans + i % count * 2, slot = i / count * decoder->capacity + span[0];
            note(ahead, memory + slot * decoder->channels, span[1] * decoder->channels);
        }
    }
}

/* What is read after the columns first <= r < last of the product `which`: its LoRAs' B; and, a share of it with each of a
 * product's columns, A of those that `lower` takes next, and what the next layer's attention sees. */
static Ahead ahead_of(const Thread *thread, int64_t layer, int which, int64_t first, int64_t last, Share share, Bytes *runs) {
    static const int next[LINEARS][2] = {[V] = {O, GATE}, [O] = {GATE, DOWN}, [UP] = {DOWN, LINEARS}, [DOWN] = {Q, O}};
    const int64_t after = layer + (which == DOWN), layers = thread->decoder->layers;
    Ahead ahead = {runs, 0};
    for (int64_t p = 0; p < thread->parts && thread->ranks; p++) {
        const Loras loras = loras_of(thread->part + p, layer, which);
        for (const Lora *lora = loras.lora; lora < loras.lora + loras.count; lora++)
            note(&ahead, lora->B + first * lora->rank, (last - first) * lora->rank);
    }
    if (thread->ranks && after < layers) {
        Ranks ranks = ranks_of_thread(thread, after, next[which][0], next[which][1]);
        for (int64_t p = 0; p < thread->parts; p++)
            for (int other = next[which][0]; other < next[which][1]; other++) {
                const Loras loras = loras_of(thread->part + p, after, other);
                for (const Lora *lora = loras.lora; lora < loras.lora + loras.count; lora++) {
                    const int64_t columns = linear_of(thread, after, other)->columns;
                    int64_t from, to;
                    if (take_ranks(&ranks, lora->rank, &from, &to) && p % share.count == share.index)
                        note(&ahead, lora->A + from * columns, (to - from) * columns);
                }
            }
    }
    const DecoderLayer *following = thread->decoder->layer + layer + 1;
    if (which == GATE && layer + 1 < layers) note_memory(thread, following, share, following->values, &ahead);
    if (which == DOWN && layer + 1 < layers) note_memory(thread, following, share, following->keys, &ahead);
    return ahead;
}

#endif
