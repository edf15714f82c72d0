/* Attention within one sample, of one head: forward, and backward from what forward returns. Flash attention's products
 * (Dao et al. 2022, arXiv:2205.14135) for a CPU, where what matters is that the tiles stay in registers.
 *
 *     S = scale Q K^T,   P = e^(S - lse) where a query sees a key, else 0,   out = P V,   lse = log sum e^S
 *     dP = g V^T,   dS = scale P (dP - delta),  delta = sum over d of g out
 *     gq = dS K,   gk = dS^T Q,   gv = P^T g
 *
 * A query sees the `front` keys of its sample (a prefix, and a context that is read in both directions), and of the others
 * itself and those before it, as far as a window reaches. What no query of a tile sees is not computed: causal attention
 * costs the half of the square.
 *
 * All seven products are one tile: 6 rows, whose sums stay in registers, times a panel of rows of which up to 64 columns
 * (AVX2: 16) go by. Vectors run along keys for S and dP, which therefore want K and V transposed, and along channels
 * elsewhere; these panels are packed once for all heads of a group (`pack_group`), with channels filled up with zeros to 16.
 * panel_tile (panels.h) is not used: P^T and dS^T are read down columns, and there is none for plain C.
 *
 * Forward takes 24 queries at a time and all of their scores: the largest is known before the first e^x, so there is
 * no running softmax to correct. They are 24 x keys numbers, and not a square. Backward, which knows lse, takes 48 queries
 * by 64 keys. The order of every sum is that of the sample's own keys, queries and channels.
 */

#ifndef QGRAFT_SAMPLES_H
#define QGRAFT_SAMPLES_H

#include "native.h"
#include "attend.h"

#ifndef v_fma /* level_base.c, which has no simd.h */
typedef float V __attribute__((vector_size(16)));
enum { LANES = 4 };
ALWAYS_INLINE V v_load(const float *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
ALWAYS_INLINE void v_store(float *p, V v) { memcpy(p, &v, sizeof v); }
#define v_set(x) ((V){x, x, x, x})
#define v_zero() v_set(0.0f)
#define v_fma(a, b, c) ((c) + (a) * (b))
#endif

enum { ROWS = 6, ACROSS = LANES == 16 ? 4 : 2, CHUNK = 16, STRIDE = ATTENTION_PANEL + CHUNK }; /* STRIDE: not 2^n */

/* Row t and column k of the left side are at in[t * row + k * step]; t < m <= ROWS. */
typedef struct {
    const float *in;
    int64_t row, step, m;
} Left;

/* out[t][n] = sum over k < depth of left[t][k] panel[k][n], or += where not fresh; N vectors of n. Rows after the last
 * compute the last again. */
ALWAYS_INLINE void sample_tile(const int N, const Left *left, const float *panel, int64_t width, int64_t depth, int fresh,
                        float *out, int64_t out_row) {
    const float *in[ROWS];
    V sums[ROWS][ACROSS];
    for (int t = 0; t < ROWS; t++) in[t] = left->in + (t < left->m ? t : left->m - 1) * left->row;
#pragma GCC unroll 6
    for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 4
        for (int v = 0; v < N; v++)
            sums[t][v] = fresh || t >= left->m ? v_zero() : v_load(out + t * out_row + LANES * v);
    for (int64_t k = 0, at = 0; k < depth; k++, at += left->step, panel += width) {
        V w[ACROSS];
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) w[v] = v_load(panel + LANES * v);
#pragma GCC unroll 6
        for (int t = 0; t < ROWS; t++) {
            const V value = v_set(in[t][at]);
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) sums[t][v] = v_fma(value, w[v], sums[t][v]);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < ROWS; t++)
        if (t < left->m)
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) v_store(out + t * out_row + LANES * v, sums[t][v]);
}

/* As sample_tile, for any number of columns, rounded up to whole vectors. */
static void sample_product(Left left, const float *panel, int64_t width, int64_t depth, int64_t columns, int fresh, float *out,
                    int64_t out_row) {
    int64_t vectors = (columns + LANES - 1) / LANES;
    for (; vectors >= ACROSS; vectors -= ACROSS, panel += ACROSS * LANES, out += ACROSS * LANES)
        sample_tile(ACROSS, &left, panel, width, depth, fresh, out, out_row);
    if (vectors == 3) sample_tile(ACROSS > 3 ? 3 : 1, &left, panel, width, depth, fresh, out, out_row);
    else if (vectors == 2) sample_tile(2, &left, panel, width, depth, fresh, out, out_row);
    else if (vectors == 1) sample_tile(1, &left, panel, width, depth, fresh, out, out_row);
}

ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ALWAYS_INLINE int64_t whole(int64_t n) { return (n + CHUNK - 1) / CHUNK * CHUNK; }

/* Which keys the queries of a sample see: j < front, and first_key(t) <= j < end_key(t). */
typedef struct {
    int64_t prefix, front, window;
} Sight;

ALWAYS_INLINE int64_t end_key(const Sight *sight, int64_t t) { return larger(sight->front, sight->prefix + t + 1); }

ALWAYS_INLINE int64_t first_key(const Sight *sight, int64_t t) {
    return sight->window ? larger(sight->front, sight->prefix + t + 1 - sight->window) : sight->front;
}

static Sight sight_of(const Attention *of, int64_t sample) {
    const int64_t tokens = of->bounds[sample + 1] - of->bounds[sample];
    const int64_t context = of->contexts ? larger(0, smaller(tokens, of->contexts[sample])) : 0;
    return (Sight){of->prefix, of->prefix + context, of->window};
}

/* Whether nobody of the queries from t on sees any of the 64 (16) keys from j on, as they are behind the window. */
ALWAYS_INLINE int out_of_sight(const Sight *sight, int64_t t, int64_t j, int64_t keys) {
    return j >= sight->front && j + keys <= first_key(sight, t);
}

/* rows [n] of `channels` numbers, `stride` apart -> out[n][wide], with zeros behind them. */
static void copy_channels(const float *rows, int64_t stride, int64_t n, int64_t channels, float *out) {
    const int64_t wide = whole(channels);
    for (int64_t i = 0; i < n; i++, rows += stride, out += wide) {
        memcpy(out, rows, (size_t)channels * sizeof(float));
        for (int64_t d = channels; d < wide; d++) out[d] = 0.0f;
    }
}

typedef float Four __attribute__((vector_size(16)));
#if defined(__clang__)
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t FourIndices __attribute__((vector_size(16)));
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (FourIndices){i, j, k, l})
#endif

/* 4 channels of 4 keys -> 4 keys of 4 channels, which are a panel's row apart. */
ALWAYS_INLINE void turn(const float *const *from, int64_t d, float *to) {
    Four rows[4], out[4];
    for (int i = 0; i < 4; i++) memcpy(&rows[i], from[i] + d, sizeof(Four));
    const Four low_a = PICK(rows[0], rows[1], 0, 4, 1, 5), high_a = PICK(rows[0], rows[1], 2, 6, 3, 7);
    const Four low_b = PICK(rows[2], rows[3], 0, 4, 1, 5), high_b = PICK(rows[2], rows[3], 2, 6, 3, 7);
    out[0] = PICK(low_a, low_b, 0, 1, 4, 5), out[1] = PICK(low_a, low_b, 2, 3, 6, 7);
    out[2] = PICK(high_a, high_b, 0, 1, 4, 5), out[3] = PICK(high_a, high_b, 2, 3, 6, 7);
    for (int i = 0; i < 4; i++) memcpy(to + i * ATTENTION_PANEL, &out[i], sizeof(Four));
}

/* Keys (values) of a prefix and of a sample, [n, channels] -> panels [n / 64][channels][64], zeros up to 16 keys. */
static void transpose_keys(const float *front, int64_t front_stride, int64_t prefix, const float *rows, int64_t stride,
                           int64_t tokens, int64_t channels, float *out) {
    enum { PANEL = ATTENTION_PANEL };
    const int64_t keys = prefix + tokens, fours = channels / 4 * 4;
    for (int64_t j = 0; j < whole(keys); j += 4) {
        float *to = out + j / PANEL * PANEL * channels + j % PANEL;
        const float *from[4];
        for (int i = 0; i < 4; i++) {
            const int64_t key = smaller(j + i, keys - 1);
            from[i] = key < prefix ? front + key * front_stride : rows + (key - prefix) * stride;
        }
        for (int64_t d = 0; d < fours; d += 4) turn(from, d, to + d * PANEL);
        for (int64_t d = fours; d < channels; d++)
            for (int i = 0; i < 4; i++) to[d * PANEL + i] = from[i][d];
        for (int64_t d = 0; d < channels && j + 4 > keys; d++)
            for (int64_t i = larger(0, keys - j); i < 4; i++) to[d * PANEL + i] = 0.0f;
    }
}

/* A group's keys and values in panels: forward K^T and V, backward K^T, V^T and K, each of `size` numbers. */
static void pack_group(const Attention *of, int64_t sample, int64_t group, int backward, float *out, int64_t size) {
    const int64_t start = of->bounds[sample], tokens = of->bounds[sample + 1] - start, channels = of->channels;
    const Strided *parts[2] = {&of->k, &of->v}, *fronts[2] = {&of->front_k, &of->front_v};
    const int copied = backward ? 0 : 1; /* which of the two is wanted as it is, too */
    for (int part = 0; part < 2; part++) {
        const Strided *rest = parts[part], *front = fronts[part];
        const float *first = of->prefix ? front->data + group * front->head : NULL;
        const float *rows = rest->data + start * rest->token + group * rest->head;
        if (part == 0 || backward)
            transpose_keys(first, front->token, of->prefix, rows, rest->token, tokens, channels, out + part * size);
        if (part == copied) {
            float *to = out + (backward ? 2 : 1) * size;
            copy_channels(first, front->token, of->prefix, channels, to);
            copy_channels(rows, rest->token, tokens, channels, to + of->prefix * whole(channels));
        }
    }
}

/* Scores of a query -> e^(scale score - largest) where it sees the key, else 0, for the keys [0, front) and [from, end) and
 * what fills their chunks of 16. Returns the sum; `largest` is of the scaled scores. */
static float weigh(const Sight *sight, int64_t t, int64_t from, int64_t end, float scale, float *scores, float *largest) {
    float tops[CHUNK], sums[CHUNK];
    for (int i = 0; i < CHUNK; i++) tops[i] = -__builtin_inff(), sums[i] = 0.0f;
    for (int64_t j = 0; j < end; j += CHUNK) {
        if (j >= sight->front && j + CHUNK <= from) continue;
        const int front = (int)(sight->front - j), first = (int)(first_key(sight, t) - j), last = (int)(end_key(sight, t) - j);
#pragma omp simd
        for (int i = 0; i < CHUNK; i++) {
            const int seen = (i < front) | ((i >= first) & (i < last));
            const float x = seen ? scale * scores[j + i] : -__builtin_inff();
            scores[j + i] = x;
            tops[i] = x > tops[i] ? x : tops[i];
        }
    }
    for (int i = 0; i < 8; i++) tops[i] = tops[i] > tops[i + 8] ? tops[i] : tops[i + 8];
    for (int i = 0; i < 4; i++) tops[i] = tops[i] > tops[i + 4] ? tops[i] : tops[i + 4];
    float top = tops[0];
    for (int i = 1; i < 4; i++) top = tops[i] > top ? tops[i] : top;
    for (int64_t j = 0; j < end; j += CHUNK) {
        if (j >= sight->front && j + CHUNK <= from) continue;
#pragma omp simd
        for (int i = 0; i < CHUNK; i++) {
            const float e = exp_negative(scores[j + i] - top);
            scores[j + i] = e;
            sums[i] += e;
        }
    }
    for (int i = 0; i < 8; i++) sums[i] += sums[i + 8];
    *largest = top;
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

/* out [tokens, heads, channels] of one head, and lse [tokens] where it is wanted. scratch: attention_scratch. */
static void attend_sample(const Attention *of, int64_t sample, int64_t head, const float *packed, int64_t size, float *scratch,
                          float *out, float *lse) {
    enum { QUERIES = ATTENTION_QUERIES, PANEL = ATTENTION_PANEL };
    const Sight sight = sight_of(of, sample);
    const int64_t start = of->bounds[sample], tokens = of->bounds[sample + 1] - start, channels = of->channels;
    const int64_t wide = whole(channels), stride = whole(of->prefix + tokens) + CHUNK, out_row = of->heads * channels;
    const float *q = of->q.data + start * of->q.token + head * of->q.head, *values = packed + size;
    float *mixed = scratch, *scores = scratch + QUERIES * wide, sums[QUERIES];
    for (int64_t t0 = 0; t0 < tokens; t0 += QUERIES) {
        const int64_t t1 = smaller(t0 + QUERIES, tokens);
        for (int64_t j = 0; j < end_key(&sight, t1 - 1); j += PANEL) {
            if (out_of_sight(&sight, t0, j, PANEL)) continue;
            for (int64_t t = t0; t < t1; t += ROWS) {
                const int64_t m = smaller(ROWS, t1 - t), seen = smaller(PANEL, end_key(&sight, t + m - 1) - j);
                const Left left = {q + t * of->q.token, of->q.token, 1, m};
                if (seen > 0)
                    sample_product(left, packed + j * channels, PANEL, channels, seen, 1, scores + (t - t0) * stride + j, stride);
            }
        }
        for (int64_t t = t0; t < t1; t += ROWS) {
            const int64_t m = smaller(ROWS, t1 - t), from = first_key(&sight, t), end = end_key(&sight, t + m - 1);
            float *weights = scores + (t - t0) * stride, *to = mixed + (t - t0) * wide;
            for (int64_t i = 0; i < m; i++) {
                float largest;
                const float sum = weigh(&sight, t + i, from, end, (float)of->scale, weights + i * stride, &largest);
                if (lse) lse[start + t + i] = largest + __builtin_logf(sum);
                sums[t - t0 + i] = sum;
            }
            const Left front = {weights, stride, 1, m}, rest = {weights + from, stride, 1, m};
            const int64_t depth = from > sight.front ? sight.front : end; /* without a gap both are one */
            sample_product(front, values, wide, depth, channels, 1, to, wide);
            if (depth < end) sample_product(rest, values + from * wide, wide, end - from, channels, 0, to, wide);
        }
        for (int64_t t = t0; t < t1; t++) {
            const float factor = 1.0f / sums[t - t0], *from = mixed + (t - t0) * wide;
            float *to = out + (start + t) * out_row + head * channels;
            for (int64_t d = 0; d < channels; d++) to[d] = from[d] * factor;
        }
    }
}

/* Scores of a query and dP, at the keys j0 <= j < j0 + n -> P and dS. */
static void weigh_back(const Sight *sight, int64_t t, int64_t j0, int64_t n, float scale, float lse, float delta,
                       float *restrict p, float *restrict ds) {
    const int64_t end = smaller(n, end_key(sight, t) - j0);
    int64_t j = 0;
    for (; j < end; j += CHUNK, p += CHUNK, ds += CHUNK) {
        const int front = (int)(sight->front - j0 - j), first = (int)(first_key(sight, t) - j0 - j);
        const int last = (int)(end_key(sight, t) - j0 - j);
#pragma omp simd
        for (int i = 0; i < CHUNK; i++) {
            const int seen = (i < front) | ((i >= first) & (i < last));
            const float e = exp_negative(scale * p[i] - lse), slope = e * (ds[i] - delta) * scale;
            p[i] = seen ? e : 0.0f;
            ds[i] = seen ? slope : 0.0f;
        }
    }
    for (; j < whole(n); j += CHUNK, p += CHUNK, ds += CHUNK)
        for (int i = 0; i < CHUNK; i++) p[i] = ds[i] = 0.0f;
}

/* What one head's queries t0 <= t < t1 give to the gradients of the keys j0 <= j < j0 + n, added to gk and gv. */
static void add_columns(const Sight *sight, int64_t t0, int64_t t1, int64_t j0, int64_t n, const float *p, const float *ds,
                        const float *q, const float *g, int64_t wide, float *gk, float *gv) {
    for (int64_t j = 0; j < n; j += ROWS) {
        const int64_t m = smaller(ROWS, n - j);
        int64_t from = t0, to = t1;
        if (j0 + j >= sight->front) {
            from = larger(t0, j0 + j - sight->prefix);
            if (sight->window) to = smaller(t1, j0 + j + m - 1 - sight->prefix + sight->window);
        }
        if (from >= to) continue;
        const int64_t row = from - t0;
        const Left weights = {p + row * STRIDE + j, 1, STRIDE, m}, slopes = {ds + row * STRIDE + j, 1, STRIDE, m};
        sample_product(weights, g + row * wide, wide, to - from, wide, 0, gv + (j0 + j) * wide, wide);
        sample_product(slopes, q + row * wide, wide, to - from, wide, 0, gk + (j0 + j) * wide, wide);
    }
}

/* Of one head: gq [tokens, heads, channels] of the sample, and gk and gv [prefix + tokens, channels up to 16], this head's
 * part. g and out are as gq, lse is [tokens]. scratch: attention_scratch. */
static void attend_sample_back(const Attention *of, int64_t sample, int64_t head, const float *packed, int64_t size,
                               float *scratch, const float *g, const float *out, const float *lse, float *gq, float *gk,
                               float *gv) {
    enum { QUERIES = ATTENTION_QUERIES_BACK, PANEL = ATTENTION_PANEL };
    const Sight sight = sight_of(of, sample);
    const int64_t start = of->bounds[sample], tokens = of->bounds[sample + 1] - start, channels = of->channels;
    const int64_t wide = whole(channels), row = of->heads * channels, at = start * row + head * channels;
    const float *from = of->q.data + start * of->q.token + head * of->q.head, *keys = packed + 2 * size;
    const int direct = wide == channels; /* sums of gq where they are wanted; else they are wider */
    const int64_t sums_row = direct ? row : wide;
    float *q = scratch, *gs = q + QUERIES * wide, *p = gs + 2 * QUERIES * wide, *ds = p + QUERIES * STRIDE, deltas[QUERIES];
    memset(gk, 0, (size_t)((of->prefix + tokens) * wide) * sizeof(float));
    memset(gv, 0, (size_t)((of->prefix + tokens) * wide) * sizeof(float));
    for (int64_t t0 = 0; t0 < tokens; t0 += QUERIES) {
        const int64_t t1 = smaller(t0 + QUERIES, tokens), end = end_key(&sight, t1 - 1);
        float *sums = direct ? gq + at + t0 * row : gs + QUERIES * wide;
        int fresh = 1;
        copy_channels(from + t0 * of->q.token, of->q.token, t1 - t0, channels, q);
        copy_channels(g + at + t0 * row, row, t1 - t0, channels, gs);
        for (int64_t t = t0; t < t1; t++) deltas[t - t0] = dot(g + at + t * row, out + at + t * row, channels);
        for (int64_t j = 0; j < end; j += PANEL) {
            const int64_t n = smaller(PANEL, end - j);
            if (out_of_sight(&sight, t0, j, PANEL)) continue;
            for (int64_t t = t0; t < t1; t += ROWS) {
                const int64_t m = smaller(ROWS, t1 - t), i = t - t0, seen = smaller(n, end_key(&sight, t + m - 1) - j);
                const Left queries = {q + i * wide, wide, 1, m}, slopes = {gs + i * wide, wide, 1, m};
                const Left weights = {ds + i * STRIDE, STRIDE, 1, m};
                if (seen > 0) {
                    sample_product(queries, packed + j * channels, PANEL, channels, seen, 1, p + i * STRIDE, STRIDE);
                    sample_product(slopes, packed + size + j * channels, PANEL, channels, seen, 1, ds + i * STRIDE, STRIDE);
                }
                for (int64_t r = i; r < i + m; r++)
                    weigh_back(&sight, t0 + r, j, n, (float)of->scale, lse[start + t0 + r], deltas[r], p + r * STRIDE,
                               ds + r * STRIDE);
                if (seen > 0) sample_product(weights, keys + j * wide, wide, seen, wide, fresh, sums + i * sums_row, sums_row);
            }
            fresh = 0;
            add_columns(&sight, t0, t1, j, n, p, ds, q, gs, wide, gk, gv);
        }
        for (int64_t t = t0; t < t1 && !direct; t++)
            memcpy(gq + at + t * row, sums + (t - t0) * wide, (size_t)channels * sizeof(float));
    }
}

static const AttentionLoops attention = {pack_group, attend_sample, attend_sample_back};

#endif
