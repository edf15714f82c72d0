/* Attention within samples that share a row of tokens, forward and backward: what samples.py calls. The loops are in
 * samples.h; here work is shared out.
 *
 * Keys and values are packed for each sample and group, then each sample and head is one piece of work. Heads of a group
 * give to the same gradients of keys and values, and samples to the same prefix: each piece has memory of its own for
 * them, which is added up in the order of heads and samples. So nothing depends on the number of threads, and the
 * results of a sample on nothing but the sample.
 */

#include <stdlib.h>

#include "native.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

const int64_t qgraft_attention_sizes[] = {sizeof(Strided), sizeof(Attention)};

enum { FLOATS = 16, PARALLEL_PRODUCTS = 1 << 18 }; /* fewer are done before a second thread has woken up */

typedef struct {
    int64_t wide, most, work; /* channels up to 16; keys of the longest sample; products of a score, roughly */
    int64_t *first;           /* [samples + 1]: where a sample's keys start, in numbers of keys, whole panels each */
} Plan;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static float *floats(int64_t count) { return aligned_alloc(64, (size_t)round_up(count + 1, FLOATS) * sizeof(float)); }

/* 0, -1 for sizes or bounds that do not fit each other, -2 without memory. */
static int make_plan(const Attention *of, Plan *plan) {
    *plan = (Plan){round_up(of->channels, FLOATS), 0, 0, NULL};
    if (of->samples < 1 || of->channels < 1 || of->groups < 1 || of->heads % of->groups || of->prefix < 0 || of->window < 0)
        return -1;
    if (of->bounds[0] != 0 || of->bounds[of->samples] != of->tokens) return -1;
    for (int64_t s = 0; s < of->samples; s++)
        if (of->bounds[s] > of->bounds[s + 1] || of->bounds[s + 1] > of->tokens) return -1;
    plan->first = malloc((size_t)(of->samples + 1) * sizeof(int64_t));
    if (!plan->first) return -2;
    plan->first[0] = 0;
    for (int64_t s = 0; s < of->samples; s++) {
        const int64_t tokens = of->bounds[s + 1] - of->bounds[s], keys = of->prefix + tokens;
        plan->first[s + 1] = plan->first[s] + round_up(keys, ATTENTION_PANEL);
        plan->most = keys > plan->most ? keys : plan->most;
        plan->work += keys * tokens * of->channels * of->heads;
    }
    return 0;
}

/* The packed keys and values of a sample and group: `parts` of them, each of *size numbers. */
static float *packed_at(const Attention *of, const Plan *plan, float *packed, int64_t parts, int64_t sample, int64_t group,
                        int64_t *size) {
    *size = (plan->first[sample + 1] - plan->first[sample]) * plan->wide;
    return packed + parts * (plan->first[sample] * plan->wide * of->groups + group * *size);
}

/* The rows of one head's part of gk or gv for a sample, [prefix + tokens, wide]. */
static float *part_at(const Attention *of, const Plan *plan, float *parts, int64_t sample, int64_t head) {
    const int64_t before = of->bounds[sample] + sample * of->prefix, keys = of->bounds[sample + 1] - of->bounds[sample] + of->prefix;
    return parts + (before * of->heads + head * keys) * plan->wide;
}

/* to [channels] += the rows `row` of the heads of a group. */
static void add_heads(const Attention *of, const Plan *plan, float *parts, int64_t sample, int64_t group, int64_t row,
                      float *to) {
    const int64_t heads = of->heads / of->groups;
    for (int64_t h = group * heads; h < (group + 1) * heads; h++) {
        const float *from = part_at(of, plan, parts, sample, h) + row * plan->wide;
        for (int64_t d = 0; d < of->channels; d++) to[d] += from[d];
    }
}

/* Everything of a sample and group that its heads gave: gk or gv [tokens, groups, channels]. */
static void add_sample(const Attention *of, const Plan *plan, float *parts, int64_t sample, int64_t group, float *grad) {
    for (int64_t t = of->bounds[sample]; t < of->bounds[sample + 1]; t++) {
        float *to = grad + (t * of->groups + group) * of->channels;
        memset(to, 0, (size_t)of->channels * sizeof(float));
        add_heads(of, plan, parts, sample, group, of->prefix + t - of->bounds[sample], to);
    }
}

/* grad [groups, prefix, channels]: what all samples gave to a group's prefix. */
static void add_prefix(const Attention *of, const Plan *plan, float *parts, int64_t group, float *grad) {
    for (int64_t j = 0; j < of->prefix; j++) {
        float *to = grad + (group * of->prefix + j) * of->channels;
        memset(to, 0, (size_t)of->channels * sizeof(float));
        for (int64_t s = 0; s < of->samples; s++) add_heads(of, plan, parts, s, group, j, to);
    }
}

/* out [tokens, heads, channels], and lse [heads, tokens] if not NULL. 0, -1 for bad sizes, -2 without memory. */
int qgraft_attend_samples(const Attention *of, float *out, float *lse, int threads) {
    Plan plan;
    const AttentionLoops *use = qgraft_level()->attention;
    const int code = make_plan(of, &plan);
    if (code) return code;
    const int64_t own = ATTENTION_QUERIES * (plan.wide + round_up(plan.most, FLOATS) + FLOATS);
    if (threads < 1 || plan.work < PARALLEL_PRODUCTS) threads = 1;
    float *packed = floats(2 * plan.first[of->samples] * plan.wide * of->groups), *scratch = floats(threads * own);
    if (packed && scratch)
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t size;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < of->samples * of->groups; i++) {
            float *to = packed_at(of, &plan, packed, 2, i / of->groups, i % of->groups, &size);
            use->pack(of, i / of->groups, i % of->groups, 0, to, size);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < of->samples * of->heads; i++) {
            const int64_t s = i / of->heads, h = i % of->heads;
            const float *from = packed_at(of, &plan, packed, 2, s, h / (of->heads / of->groups), &size);
            use->forward(of, s, h, from, size, scratch + omp_get_thread_num() * own, out, lse ? lse + h * of->tokens : NULL);
        }
    }
    const int done = packed && scratch ? 0 : -2;
    free(packed), free(scratch), free(plan.first);
    return done;
}

/* g, out, gq [tokens, heads, channels], lse [heads, tokens], gk, gv [tokens, groups, channels], front_gk, front_gv [groups,
 * prefix, channels]. 0, -1 for bad sizes, -2 without memory. */
int qgraft_attend_samples_backward(const Attention *of, const float *g, const float *out, const float *lse, float *gq,
                                   float *gk, float *gv, float *front_gk, float *front_gv, int threads) {
    Plan plan;
    const AttentionLoops *use = qgraft_level()->attention;
    const int code = make_plan(of, &plan);
    if (code) return code;
    const int64_t own = ATTENTION_QUERIES_BACK * (3 * plan.wide + 2 * (ATTENTION_PANEL + FLOATS));
    const int64_t keys = of->tokens + of->samples * of->prefix;
    if (threads < 1 || plan.work < PARALLEL_PRODUCTS) threads = 1;
    float *packed = floats(3 * plan.first[of->samples] * plan.wide * of->groups), *scratch = floats(threads * own);
    float *parts_k = floats(keys * plan.wide * of->heads), *parts_v = floats(keys * plan.wide * of->heads);
    const int done = packed && scratch && parts_k && parts_v ? 0 : -2;
    if (!done)
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t size;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < of->samples * of->groups; i++) {
            float *to = packed_at(of, &plan, packed, 3, i / of->groups, i % of->groups, &size);
            use->pack(of, i / of->groups, i % of->groups, 1, to, size);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < of->samples * of->heads; i++) {
            const int64_t s = i / of->heads, h = i % of->heads;
            const float *from = packed_at(of, &plan, packed, 3, s, h / (of->heads / of->groups), &size);
            use->backward(of, s, h, from, size, scratch + omp_get_thread_num() * own, g, out, lse + h * of->tokens, gq,
                          part_at(of, &plan, parts_k, s, h), part_at(of, &plan, parts_v, s, h));
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (of->samples + 1) * of->groups; i++) {
            const int64_t s = i / of->groups, group = i % of->groups;
            if (s < of->samples) {
                add_sample(of, &plan, parts_k, s, group, gk);
                add_sample(of, &plan, parts_v, s, group, gv);
            } else if (of->prefix) {
                add_prefix(of, &plan, parts_k, group, front_gk);
                add_prefix(of, &plan, parts_v, group, front_gv);
            }
        }
    }
    free(packed), free(scratch), free(parts_k), free(parts_v), free(plan.first);
    return done;
}
