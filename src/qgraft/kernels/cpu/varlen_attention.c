/* Attention within samples that share a row of tokens, forward and backward: what varlen_attention.py calls. The loops are
 * in varlen_attention.h; here work is shared out.
 *
 * Keys and values are packed for each sample and group, then each sample and head is one piece of work. Heads of a group
 * give to the same gradients of keys and values, and samples to the same prefix: each piece has memory of its own for
 * them, which is added up in the order of heads and samples. So nothing depends on the number of threads, and the
 * results of a sample on nothing but the sample.
 */

#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "level.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

const int64_t qgraft_attention_sizes[] = {sizeof(Strided), sizeof(Attention)};

enum { ALIGNED = 16, PARALLEL_PRODUCTS = 1 << 18 }; /* fewer are done before a second thread has woken up */

typedef struct {
    int64_t wide, most, work; /* channels up to 16; keys of the longest sample; products of a score, roughly */
    int64_t *first;           /* [samples + 1]: where a sample's keys start, in numbers of keys, whole panels each */
} Plan;

static float *allocate(int64_t count) { return aligned_alloc(64, (size_t)round_up(count + 1, ALIGNED) * sizeof(float)); }

/* 0, -1 for sizes or bounds that do not fit each other, -2 without memory. */
static int make_plan(const Attention *call, Plan *plan) {
    *plan = (Plan){round_up(call->channels, ALIGNED), 0, 0, NULL};
    if (call->samples < 1 || call->channels < 1 || call->groups < 1 || call->heads % call->groups) return -1;
    if (call->prefix < 0 || call->window < 0) return -1;
    if (call->bounds[0] != 0 || call->bounds[call->samples] != call->tokens) return -1;
    for (int64_t s = 0; s < call->samples; s++)
        if (call->bounds[s] > call->bounds[s + 1] || call->bounds[s + 1] > call->tokens) return -1;
    plan->first = malloc((size_t)(call->samples + 1) * sizeof(int64_t));
    if (!plan->first) return -2;
    plan->first[0] = 0;
    for (int64_t s = 0; s < call->samples; s++) {
        const int64_t tokens = call->bounds[s + 1] - call->bounds[s], keys = call->prefix + tokens;
        plan->first[s + 1] = plan->first[s] + round_up(keys, ATTENTION_PANEL);
        plan->most = keys > plan->most ? keys : plan->most;
        plan->work += keys * tokens * call->channels * call->heads;
    }
    return 0;
}

/* The packed keys and values of a sample and group: `parts` of them, each of *size numbers. */
static float *packed_at(const Attention *call, const Plan *plan, float *packed, int64_t parts, int64_t sample, int64_t group,
                        int64_t *size) {
    *size = (plan->first[sample + 1] - plan->first[sample]) * plan->wide;
    return packed + parts * (plan->first[sample] * plan->wide * call->groups + group * *size);
}

/* The rows of one head's part of gk or gv for a sample, [prefix + tokens, wide]. */
static float *part_at(const Attention *call, const Plan *plan, float *parts, int64_t sample, int64_t head) {
    const int64_t start = call->bounds[sample], before = start + sample * call->prefix;
    const int64_t keys = call->bounds[sample + 1] - start + call->prefix;
    return parts + (before * call->heads + head * keys) * plan->wide;
}

/* to [channels] += the rows `row` of the heads of a group. */
static void add_heads(const Attention *call, const Plan *plan, float *parts, int64_t sample, int64_t group, int64_t row,
                      float *to) {
    const int64_t heads = call->heads / call->groups;
    for (int64_t h = group * heads; h < (group + 1) * heads; h++) {
        const float *from = part_at(call, plan, parts, sample, h) + row * plan->wide;
        for (int64_t d = 0; d < call->channels; d++) to[d] += from[d];
    }
}

/* Everything of a sample and group that its heads gave: gk or gv [tokens, groups, channels]. */
static void add_sample(const Attention *call, const Plan *plan, float *parts, int64_t sample, int64_t group, float *grad) {
    for (int64_t t = call->bounds[sample]; t < call->bounds[sample + 1]; t++) {
        float *to = grad + (t * call->groups + group) * call->channels;
        memset(to, 0, (size_t)call->channels * sizeof(float));
        add_heads(call, plan, parts, sample, group, call->prefix + t - call->bounds[sample], to);
    }
}

/* grad [groups, prefix, channels]: what all samples gave to a group's prefix. */
static void add_prefix(const Attention *call, const Plan *plan, float *parts, int64_t group, float *grad) {
    for (int64_t j = 0; j < call->prefix; j++) {
        float *to = grad + (group * call->prefix + j) * call->channels;
        memset(to, 0, (size_t)call->channels * sizeof(float));
        for (int64_t s = 0; s < call->samples; s++) add_heads(call, plan, parts, s, group, j, to);
    }
}

/* out [tokens, heads, channels], and lse [heads, tokens] if not NULL. 0, -1 for bad sizes, -2 without memory. */
int qgraft_varlen_attention(const Attention *call, float *out, float *lse, int threads) {
    Plan plan;
    const VarlenAttention *loops = qgraft_level()->attention;
    const int code = make_plan(call, &plan);
    if (code) return code;
    const int64_t own = ATTENTION_QUERIES * (plan.wide + round_up(plan.most, ALIGNED) + ALIGNED);
    if (threads < 1 || plan.work < PARALLEL_PRODUCTS) threads = 1;
    float *packed = allocate(2 * plan.first[call->samples] * plan.wide * call->groups), *scratch = allocate(threads * own);
    if (packed && scratch)
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t size;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < call->samples * call->groups; i++) {
            float *to = packed_at(call, &plan, packed, 2, i / call->groups, i % call->groups, &size);
            loops->pack(call, i / call->groups, i % call->groups, 0, to, size);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < call->samples * call->heads; i++) {
            const int64_t s = i / call->heads, h = i % call->heads;
            const float *from = packed_at(call, &plan, packed, 2, s, h / (call->heads / call->groups), &size);
            float *mine = scratch + omp_get_thread_num() * own;
            loops->forward(call, s, h, from, size, mine, out, lse ? lse + h * call->tokens : NULL);
        }
    }
    const int done = packed && scratch ? 0 : -2;
    free(packed), free(scratch), free(plan.first);
    return done;
}

/* g, out, gq [tokens, heads, channels], lse [heads, tokens], gk, gv [tokens, groups, channels], front_gk, front_gv [groups,
 * prefix, channels]. 0, -1 for bad sizes, -2 without memory. */
int qgraft_varlen_attention_backward(const Attention *call, const float *g, const float *out, const float *lse, float *gq,
                                   float *gk, float *gv, float *front_gk, float *front_gv, int threads) {
    Plan plan;
    const VarlenAttention *loops = qgraft_level()->attention;
    const int code = make_plan(call, &plan);
    if (code) return code;
    const int64_t own = ATTENTION_QUERIES_BACKWARD * (3 * plan.wide + 2 * (ATTENTION_PANEL + ALIGNED));
    const int64_t keys = call->tokens + call->samples * call->prefix;
    if (threads < 1 || plan.work < PARALLEL_PRODUCTS) threads = 1;
    float *packed = allocate(3 * plan.first[call->samples] * plan.wide * call->groups), *scratch = allocate(threads * own);
    float *parts_k = allocate(keys * plan.wide * call->heads), *parts_v = allocate(keys * plan.wide * call->heads);
    const int done = packed && scratch && parts_k && parts_v ? 0 : -2;
    if (!done)
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t size;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < call->samples * call->groups; i++) {
            float *to = packed_at(call, &plan, packed, 3, i / call->groups, i % call->groups, &size);
            loops->pack(call, i / call->groups, i % call->groups, 1, to, size);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < call->samples * call->heads; i++) {
            const int64_t s = i / call->heads, h = i % call->heads;
            const float *from = packed_at(call, &plan, packed, 3, s, h / (call->heads / call->groups), &size);
            float *mine = scratch + omp_get_thread_num() * own;
            loops->backward(call, s, h, from, size, mine, g, out, lse + h * call->tokens, gq,
                            part_at(call, &plan, parts_k, s, h), part_at(call, &plan, parts_v, s, h));
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (call->samples + 1) * call->groups; i++) {
            const int64_t s = i / call->groups, group = i % call->groups;
            if (s < call->samples) {
                add_sample(call, &plan, parts_k, s, group, gk);
                add_sample(call, &plan, parts_v, s, group, gv);
            } else if (call->prefix) {
                add_prefix(call, &plan, parts_k, group, front_gk);
                add_prefix(call, &plan, parts_v, group, front_gv);
            }
        }
    }
    free(packed), free(scratch), free(parts_k), free(parts_v), free(plan.first);
    return done;
}
