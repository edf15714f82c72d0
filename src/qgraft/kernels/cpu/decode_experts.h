/* The experts of a mixture in a step of decode.c: which of them a row goes to, and what they make of it.
 *
 *     l = x Wr^T + br                       the logits of all experts
 *     s = softmax(l), sigmoid(l), or l      their scores
 *     the K largest of s + c                are chosen; with groups, of those whose two best have the largest sums
 *     w = s of these, softmax(s) of l       normalized: w / (max(sum, least) + added); times a factor
 *     y = sum w_e (g(x Wg_e^T + bg_e, x Wu_e^T + bu_e) Wd_e^T + bd_e)      g(a, b) = silu(a) b, or a clamped one
 *
 * Each thread chooses for itself, which takes less than to wait for others, and has its columns of every product, so that no
 * number depends on how many threads there are. Rows are sorted by their experts: those of one are multiplied together. Only
 * the weights of experts that are chosen are read.
 */

#ifndef QGRAFT_DECODE_EXPERTS_H
#define QGRAFT_DECODE_EXPERTS_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "decode_product.h"
#include "decode_thread.h"
#include "level.h"
#include "vector_math.h"

enum { SOFTMAX, SIGMOID, LOGITS, SCORES }; /* as SCORES of kernels/decoder.py */

/* The thread's columns of the logits of all rows, whose x is normed. */
static void score_experts(const Thread *thread, const Experts *experts) {
    const int64_t n = experts->experts, hidden = thread->decoder->hidden;
    int64_t first, last;
    columns_of_thread(thread, n, &first, &last);
    const Product product = {F32, (const uint8_t *)experts->router, NULL, row_bytes(F32, hidden), n, hidden, first, last,
                             thread->rows, thread->logits, NULL};
    if (first < last) thread->level->gemv(&product, thread->normed);
    for (int64_t t = 0; experts->router_bias && t < thread->rows; t++)
        for (int64_t e = first; e < last; e++) thread->logits[t * n + e] += experts->router_bias[e];
}

static float sigmoid(float x) {
    const float e = exp_negative(-__builtin_fabsf(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

static void softmax(const float *logits, int64_t n, float *shares) {
    float most = logits[0], sum = 0.0f;
    for (int64_t i = 1; i < n; i++) most = logits[i] > most ? logits[i] : most;
    for (int64_t i = 0; i < n; i++) sum += shares[i] = exp_negative(logits[i] - most);
    for (int64_t i = 0; i < n; i++) shares[i] /= sum;
}

/* NaN is larger than all numbers, as it is to torch. */
static int exceeds(float a, float b) { return a > b || (a != a && b == b); }

/* The places of the k largest of n >= k numbers, the largest first, and of equal ones those in front. */
static void find_largest(const float *values, int64_t n, int64_t k, int64_t *places) {
    for (int64_t i = 0; i < n; i++) {
        int64_t at = smaller(i, k - 1);
        if (i >= k && !exceeds(values[i], values[places[at]])) continue;
        for (; at > 0 && exceeds(values[i], values[places[at - 1]]); at--) places[at] = places[at - 1];
        places[at] = i;
    }
}

/* Makes the choice of experts outside of the kept groups the last one; `sums`, `places`: scratch. */
static void keep_groups(const Experts *experts, float *choice, float *sums, int64_t *places) {
    const int64_t count = experts->expert_groups, each = experts->experts / count;
    for (int64_t g = 0; g < count; g++) {
        find_largest(choice + g * each, each, 2, places);
        sums[g] = choice[g * each + places[0]] + choice[g * each + places[1]];
    }
    find_largest(sums, count, experts->kept_groups, places);
    for (int64_t g = 0; g < count; g++) {
        int kept = 0;
        for (int64_t i = 0; i < experts->kept_groups; i++) kept |= places[i] == g;
        for (int64_t e = 0; !kept && e < each; e++) choice[g * each + e] = -__builtin_inff();
    }
}

/* Which experts a row with these logits goes to, and what each is weighted by. */
static void choose_experts(const Thread *thread, const Experts *experts, const float *logits, int64_t *chosen, float *shares) {
    const int64_t n = experts->experts, k = experts->chosen;
    float *scores = thread->choice, *choice = scores + n, *sums = choice + n, sum = 0.0f;
    if (experts->scores == SOFTMAX) softmax(logits, n, scores);
    else if (experts->scores == LOGITS) memcpy(scores, logits, (size_t)n * sizeof(float));
    else
        for (int64_t e = 0; e < n; e++) scores[e] = sigmoid(logits[e]);
    for (int64_t e = 0; e < n; e++) choice[e] = scores[e] + (experts->correction ? experts->correction[e] : 0.0f);
    if (experts->expert_groups > 1) keep_groups(experts, choice, sums, thread->ends);
    find_largest(choice, n, k, chosen);
    for (int64_t i = 0; i < k; i++) shares[i] = scores[chosen[i]];
    if (experts->scores == LOGITS) softmax(shares, k, shares);
    for (int64_t i = 0; i < k; i++) sum += shares[i];
    sum = (sum < (float)experts->least_sum ? (float)experts->least_sum : sum) + (float)experts->added_to_sum;
    for (int64_t i = 0; i < k; i++) shares[i] = (experts->normalized ? shares[i] / sum : shares[i]) * (float)experts->scaling;
}

/* Chooses for all rows; thread->order: the choices (row * K + which of its K), sorted by experts; thread->ends: where those of
 * each expert end. */
static void sort_by_experts(const Thread *thread, const Experts *experts) {
    const int64_t n = experts->experts, k = experts->chosen, count = thread->rows * k;
    for (int64_t t = 0; t < thread->rows; t++)
        choose_experts(thread, experts, thread->logits + t * n, thread->chosen + t * k, thread->shares + t * k);
    int64_t *ends = thread->ends, before = 0;
    memset(ends, 0, (size_t)n * sizeof(int64_t));
    for (int64_t i = 0; i < count; i++) ends[thread->chosen[i]]++;
    for (int64_t e = 0; e < n; e++) { /* for now, where they begin */
        const int64_t own = ends[e];
        ends[e] = before, before += own;
    }
    for (int64_t i = 0; i < count; i++) thread->order[ends[thread->chosen[i]]++] = i;
}

/* The normed x of these of the sorted rows, next to each other. */
static const float *gather(const Thread *thread, const int64_t *choices, int64_t count, int64_t k) {
    const int64_t hidden = thread->decoder->hidden;
    if (count == 1 || count == thread->rows) return thread->normed + choices[0] / k * hidden;
    for (int64_t i = 0; i < count; i++)
        memcpy(thread->gathered + i * hidden, thread->normed + choices[i] / k * hidden, (size_t)hidden * sizeof(float));
    return thread->gathered;
}

/* Rows of one expert: the choices that they are of, their x next to each other. */
typedef struct {
    int64_t layer, expert, count;
    const int64_t *choices;
    const float *x;
} Group;

/* What the LoRAs of the rows' parts add to the columns first <= r < last of y [count, rows]: s (x A_e^T) B_e^T. Each thread has
 * h = x A_e^T for itself, as it has its choice. */
static void add_expert_loras(const Thread *thread, const Linear *linear, int which, const Group *group, int64_t first,
                             int64_t last, float *y) {
    const int64_t rows = linear->rows, columns = linear->columns, k = thread->decoder->layer[group->layer].experts->chosen;
    for (int64_t p = 0, stop = 0, from = 0, to = 0; p < thread->parts; p++, from = to) {
        stop += thread->part[p].rows;
        while (to < group->count && group->choices[to] / k < stop) to++;
        const Loras loras = loras_of(thread->part + p, group->layer, which);
        for (const Lora *lora = loras.lora; from < to && lora < loras.lora + loras.count; lora++) {
            const float *A = lora->A + group->expert * lora->rank * columns, *B = lora->B + group->expert * lora->step;
            const Product product = {F32, (const uint8_t *)A, NULL, row_bytes(F32, columns), lora->rank, columns,
                                     0, lora->rank, to - from, thread->low, NULL};
            thread->level->gemv(&product, group->x + from * columns);
            for (int64_t i = 0; i < (to - from) * lora->rank; i++) thread->low[i] *= (float)lora->scaling;
            for (int64_t i = from; i < to; i++)
                thread->level->decoding->add_rows(B + first * lora->rank, thread->low + (i - from) * lora->rank, last - first,
                                                  lora->rank, y + i * rows + first);
        }
    }
}

/* The thread's columns of one projection of an expert: y [count, rows] = x W_e^T + b_e + LoRAs. */
static void project_expert(const Thread *thread, const Linear *linear, int which, const Group *group, const float *bias,
                           int64_t bias_step, float *y) {
    int64_t first, last;
    columns_of_thread(thread, linear->rows, &first, &last);
    if (first == last) return;
    const Product product = product_of(linear, group->expert, first, last, group->count, y);
    multiply_rows(thread, (int)linear->int8, &product, group->x);
    for (int64_t i = 0; bias && i < group->count; i++)
        for (int64_t r = first; r < last; r++) y[i * linear->rows + r] += bias[r * bias_step];
    add_expert_loras(thread, linear, which, group, first, last, y);
}

/* The thread's columns of what is between gate and down of all chosen experts, once the logits are there. */
static void open_experts(const Thread *thread, int64_t layer, const Experts *experts) {
    const int64_t inner = experts->gate.rows, k = experts->chosen, step = experts->bias_step;
    int64_t first, last;
    sort_by_experts(thread, experts);
    columns_of_thread(thread, inner, &first, &last);
    for (int64_t e = 0, from = 0; e < experts->experts; from = thread->ends[e++]) {
        const int64_t count = thread->ends[e] - from, at = 2 * e * inner;
        if (!count) continue;
        const int64_t *choices = thread->order + from;
        const Group group = {layer, e, count, choices, gather(thread, choices, count, k)};
        float *gate = thread->routed_gate + from * inner, *up = thread->routed_up + from * inner;
        const float *gate_bias = experts->gate_bias ? experts->gate_bias + at : NULL;
        project_expert(thread, &experts->gate, EXPERT_GATE, &group, gate_bias, step, gate);
        project_expert(thread, &experts->up, EXPERT_UP, &group, experts->up_bias ? experts->up_bias + at : NULL, step, up);
        for (int64_t i = 0; i < count && first < last; i++, gate += inner, up += inner) {
            if (experts->clamped)
                thread->level->decoding->clamped_gate(gate + first, up + first, (float)experts->limit, (float)experts->alpha,
                                                      last - first, gate + first);
            else thread->level->pointwise->gated(SILU, gate + first, up + first, last - first, gate + first);
        }
    }
}

/* The thread's columns of y [rows, hidden], into thread->normed. */
static void close_experts(const Thread *thread, int64_t layer, const Experts *experts) {
    const int64_t hidden = thread->decoder->hidden, inner = experts->gate.rows, k = experts->chosen;
    int64_t first, last;
    columns_of_thread(thread, hidden, &first, &last);
    for (int64_t t = 0; t < thread->rows && first < last; t++)
        memset(thread->normed + t * hidden + first, 0, (size_t)(last - first) * sizeof(float));
    for (int64_t e = 0, from = 0; e < experts->experts; from = thread->ends[e++]) {
        const int64_t count = thread->ends[e] - from;
        if (!count) continue;
        const float *bias = experts->down.bias ? experts->down.bias + e * hidden : NULL;
        const Group group = {layer, e, count, thread->order + from, thread->routed_gate + from * inner};
        project_expert(thread, &experts->down, EXPERT_DOWN, &group, bias, 1, thread->gathered);
        for (int64_t i = 0; i < count; i++) {
            const int64_t choice = group.choices[i];
            float *y = thread->normed + choice / k * hidden;
            for (int64_t r = first; r < last; r++) y[r] += thread->shares[choice] * thread->gathered[i * hidden + r];
        }
    }
}

/* Whether every number is one that the loops can go by. */
static int is_sound_mixture(const Experts *experts, int64_t hidden) {
    const int64_t groups = experts->expert_groups, kept = experts->kept_groups, chosen = experts->chosen;
    if (experts->scores < 0 || experts->scores >= SCORES || experts->experts < 1 || chosen < 1) return 0;
    if (groups < 1 || kept < 1 || kept > groups || experts->experts % groups) return 0;
    const int64_t each = experts->experts / groups;
    if (chosen > kept * each || (groups > 1 && each < 2)) return 0;
    const Linear *gate = &experts->gate, *up = &experts->up, *down = &experts->down;
    return gate->columns == hidden && up->columns == hidden && down->rows == hidden && gate->rows == up->rows
           && gate->rows == down->columns;
}

#endif
