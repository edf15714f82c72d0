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
 * elsewhere; these panels are packed once for all heads of a group (`pack_keys_values`), channels filled up with zeros to 16.
 * gemm_tile (gemm.h) is not used: P^T and dS^T are read down columns, and there is none for plain C.
 *
 * Forward takes 24 queries at a time and all of their scores: the largest is known before the first e^x, so there is
 * no running softmax to correct. They are 24 x keys numbers, and not a square. Backward, which knows lse, takes 48 queries
 * by 64 keys. The order of every sum is that of the sample's own keys, queries and channels.
 */

#ifndef QGRAFT_VARLEN_ATTENTION_H
#define QGRAFT_VARLEN_ATTENTION_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "level.h"
#include "vec.h"
#include "vector_math.h"

enum { ROWS = 6, ACROSS = LANES == 16 ? 4 : 2, CHUNK = 16, STRIDE = ATTENTION_PANEL + CHUNK }; /* STRIDE: not 2^n */

/* Row t and column k of the left side are at in[t * row + k * step]; t < m <= ROWS. */
typedef struct {
    const float *in;
    int64_t row, step, m;
} Left;

/* out[t][n] = sum over k < depth of left[t][k] panel[k][n], or += where not fresh; N vectors of n. Rows after the last
 * compute the last again. */
ALWAYS_INLINE void attention_tile(const int N, const Left *left, const float *panel, int64_t width, int64_t depth, int fresh,
                                  float *out, int64_t out_row) {
    const float *in[ROWS];
    vfloat sums[ROWS][ACROSS];
    for (int t = 0; t < ROWS; t++) in[t] = left->in + (t < left->m ? t : left->m - 1) * left->row;
#pragma GCC unroll 6
    for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 4
        for (int v = 0; v < N; v++)
            sums[t][v] = fresh || t >= left->m ? v_zero() : v_load(out + t * out_row + LANES * v);
    for (int64_t k = 0, at = 0; k < depth; k++, at += left->step, panel += width) {
        vfloat w[ACROSS];
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) w[v] = v_load(panel + LANES * v);
#pragma GCC unroll 6
        for (int t = 0; t < ROWS; t++) {
            const vfloat value = v_set(in[t][at]);
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

/* As attention_tile, for any number of columns, rounded up to whole vectors. */
static void attention_product(Left left, const float *panel, int64_t width, int64_t depth, int64_t columns, int fresh,
                              float *out, int64_t out_row) {
    int64_t count = (columns + LANES - 1) / LANES;
    for (; count >= ACROSS; count -= ACROSS, panel += ACROSS * LANES, out += ACROSS * LANES)
        attention_tile(ACROSS, &left, panel, width, depth, fresh, out, out_row);
    if (count == 3) attention_tile(ACROSS > 3 ? 3 : 1, &left, panel, width, depth, fresh, out, out_row);
    else if (count == 2) attention_tile(2, &left, panel, width, depth, fresh, out, out_row);
    else if (count == 1) attention_tile(1, &left, panel, width, depth, fresh, out, out_row);
}

ALWAYS_INLINE int64_t whole_chunks(int64_t n) { return round_up(n, CHUNK); }

/* Which keys the queries of a sample see: j < front, and first_key(t) <= j < end_key(t). */
typedef struct {
    int64_t prefix, front, window;
} Mask;

ALWAYS_INLINE int64_t end_key(const Mask *mask, int64_t t) { return larger(mask->front, mask->prefix + t + 1); }

ALWAYS_INLINE int64_t first_key(const Mask *mask, int64_t t) {
    return mask->window ? larger(mask->front, mask->prefix + t + 1 - mask->window) : mask->front;
}

static Mask mask_of(const Attention *call, int64_t sample) {
    const int64_t tokens = call->bounds[sample + 1] - call->bounds[sample];
    const int64_t context = call->contexts ? larger(0, smaller(tokens, call->contexts[sample])) : 0;
    return (Mask){call->prefix, call->prefix + context, call->window};
}

/* Whether nobody of the queries from t on sees any of the 64 (16) keys from j on, as they are behind the window. */
ALWAYS_INLINE int all_masked(const Mask *mask, int64_t t, int64_t j, int64_t keys) {
    return j >= mask->front && j + keys <= first_key(mask, t);
}

/* rows [n] of `channels` numbers, `stride` apart -> out[n][wide], with zeros behind them. */
static void copy_channels(const float *rows, int64_t stride, int64_t n, int64_t channels, float *out) {
    const int64_t wide = whole_chunks(channels);
    for (int64_t i = 0; i < n; i++, rows += stride, out += wide) {
        memcpy(out, rows, (size_t)channels * sizeof(float));
        for (int64_t d = channels; d < wide; d++) out[d] = 0.0f;
    }
}

/* Keys (values) of a prefix and of a sample, [n, channels] -> panels [n / 64][channels][64], zeros up to 16 keys. */
static void transpose_keys(const float *front, int64_t front_stride, int64_t prefix, const float *rows, int64_t stride,
                           int64_t tokens, int64_t channels, float *out) {
    enum { PANEL = ATTENTION_PANEL };
    const int64_t keys = prefix + tokens, fours = channels / 4 * 4;
    for (int64_t j = 0; j < whole_chunks(keys); j += 4) {
        float *to = out + j / PANEL * PANEL * channels + j % PANEL;
        const float *from[4];
        for (int i = 0; i < 4; i++) {
            const int64_t key = smaller(j + i, keys - 1);
            from[i] = key < prefix ? front + key * front_stride : rows + (key - prefix) * stride;
        }
        for (int64_t d = 0; d < fours; d += 4) transpose4x4(from, d, to + d * PANEL, PANEL);
        for (int64_t d = fours; d < channels; d++)
            for (int i = 0; i < 4; i++) to[d * PANEL + i] = from[i][d];
        for (int64_t d = 0; d < channels && j + 4 > keys; d++)
            for (int64_t i = larger(0, keys - j); i < 4; i++) to[d * PANEL + i] = 0.0f;
    }
}

/* A group's keys and values in panels: forward K^T and V, backward K^T, V^T and K, each of `size` numbers. */
static void pack_keys_values(const Attention *call, int64_t sample, int64_t group, int backward, float *out, int64_t size) {
    const int64_t start = call->bounds[sample], tokens = call->bounds[sample + 1] - start, channels = call->channels;
    const Strided *parts[2] = {&call->k, &call->v}, *fronts[2] = {&call->front_k, &call->front_v};
    const int copied = backward ? 0 : 1; /* which of the two is wanted as it is, too */
    for (int part = 0; part < 2; part++) {
        const Strided *rest = parts[part], *front = fronts[part];
        const float *first = call->prefix ? front->data + group * front->head : NULL;
        const float *rows = rest->data + start * rest->token + group * rest->head;
        if (part == 0 || backward)
            transpose_keys(first, front->token, call->prefix, rows, rest->token, tokens, channels, out + part * size);
        if (part == copied) {
            float *to = out + (backward ? 2 : 1) * size;
            copy_channels(first, front->token, call->prefix, channels, to);
            copy_channels(rows, rest->token, tokens, channels, to + call->prefix * whole_chunks(channels));
        }
    }
}

/* Scores of a query -> e^(scale score - largest) where it sees the key, else 0, for the keys [0, front) and [from, end) and
 * what fills their chunks of 16. Returns the sum; `largest` is of the scaled scores. */
static float softmax_row(const Mask *mask, int64_t t, int64_t from, int64_t end, float scale, float *scores, float *largest) {
    float tops[CHUNK], sums[CHUNK];
    for (int i = 0; i < CHUNK; i++) tops[i] = -__builtin_inff(), sums[i] = 0.0f;
    for (int64_t j = 0; j < end; j += CHUNK) {
        if (j >= mask->front && j + CHUNK <= from) continue;
        const int front = (int)(mask->front - j), first = (int)(first_key(mask, t) - j), last = (int)(end_key(mask, t) - j);
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
        if (j >= mask->front && j + CHUNK <= from) continue;
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
static void attention_forward(const Attention *call, int64_t sample, int64_t head, const float *packed, int64_t size,
                              float *scratch, float *out, float *lse) {
    enum { QUERIES = ATTENTION_QUERIES, PANEL = ATTENTION_PANEL };
    const Mask mask = mask_of(call, sample);
    const int64_t start = call->bounds[sample], tokens = call->bounds[sample + 1] - start, channels = call->channels;
    const int64_t wide = whole_chunks(channels), stride = whole_chunks(call->prefix + tokens) + CHUNK;
    const int64_t out_row = call->heads * channels;
    const float *q = call->q.data + start * call->q.token + head * call->q.head, *values = packed + size;
    float *attended = scratch, *scores = scratch + QUERIES * wide, sums[QUERIES];
    for (int64_t t0 = 0; t0 < tokens; t0 += QUERIES) {
        const int64_t t1 = smaller(t0 + QUERIES, tokens);
        for (int64_t j = 0; j < end_key(&mask, t1 - 1); j += PANEL) {
            if (all_masked(&mask, t0, j, PANEL)) continue;
            for (int64_t t = t0; t < t1; t += ROWS) {
                const int64_t m = smaller(ROWS, t1 - t), seen = smaller(PANEL, end_key(&mask, t + m - 1) - j);
                const Left left = {q + t * call->q.token, call->q.token, 1, m};
                if (seen > 0)
                    attention_product(left, packed + j * channels, PANEL, channels, seen, 1,
                                      scores + (t - t0) * stride + j, stride);
            }
        }
        for (int64_t t = t0; t < t1; t += ROWS) {
            const int64_t m = smaller(ROWS, t1 - t), from = first_key(&mask, t), end = end_key(&mask, t + m - 1);
            float *weights = scores + (t - t0) * stride, *to = attended + (t - t0) * wide;
            for (int64_t i = 0; i < m; i++) {
                float largest;
                const float sum = softmax_row(&mask, t + i, from, end, (float)call->scale, weights + i * stride, &largest);
                if (lse) lse[start + t + i] = largest + __builtin_logf(sum);
                sums[t - t0 + i] = sum;
            }
            const Left front = {weights, stride, 1, m}, rest = {weights + from, stride, 1, m};
            const int64_t depth = from > mask.front ? mask.front : end; /* without a gap both are one */
            attention_product(front, values, wide, depth, channels, 1, to, wide);
            if (depth < end) attention_product(rest, values + from * wide, wide, end - from, channels, 0, to, wide);
        }
        for (int64_t t = t0; t < t1; t++) {
            const float factor = 1.0f / sums[t - t0], *from = attended + (t - t0) * wide;
            float *to = out + (start + t) * out_row + head * channels;
            for (int64_t d = 0; d < channels; d++) to[d] = from[d] * factor;
        }
    }
}

/* Scores of a query and dP, at the keys j0 <= j < j0 + n -> P and dS. */
static void softmax_row_backward(const Mask *mask, int64_t t, int64_t j0, int64_t n, float scale, float lse, float delta,
                                 float *restrict p, float *restrict ds) {
    const int64_t end = smaller(n, end_key(mask, t) - j0);
    int64_t j = 0;
    for (; j < end; j += CHUNK, p += CHUNK, ds += CHUNK) {
        const int front = (int)(mask->front - j0 - j), first = (int)(first_key(mask, t) - j0 - j);
        const int last = (int)(end_key(mask, t) - j0 - j);
#pragma omp simd
        for (int i = 0; i < CHUNK; i++) {
            const int seen = (i < front) | ((i >= first) & (i < last));
            const float e = exp_negative(scale * p[i] - lse), slope = e * (ds[i] - delta) * scale;
            p[i] = seen ? e : 0.0f;
            ds[i] = seen ? slope : 0.0f;
        }
    }
    for (; j < whole_chunks(n); j += CHUNK, p += CHUNK, ds += CHUNK)
        for (int i = 0; i < CHUNK; i++) p[i] = ds[i] = 0.0f;
}

/* What one head's queries t0 <= t < t1 give to the gradients of the keys j0 <= j < j0 + n, added to gk and gv. */
static void add_key_gradients(const Mask *mask, int64_t t0, int64_t t1, int64_t j0, int64_t n, const float *p,
                              const float *ds, const float *q, const float *g, int64_t wide, float *gk, float *gv) {
    for (int64_t j = 0; j < n; j += ROWS) {
        const int64_t m = smaller(ROWS, n - j);
        int64_t from = t0, to = t1;
        if (j0 + j >= mask->front) {
            from = larger(t0, j0 + j - mask->prefix);
            if (mask->window) to = smaller(t1, j0 + j + m - 1 - mask->prefix + mask->window);
        }
        if (from >= to) continue;
        const int64_t row = from - t0;
        const Left weights = {p + row * STRIDE + j, 1, STRIDE, m}, slopes = {ds + row * STRIDE + j, 1, STRIDE, m};
        attention_product(weights, g + row * wide, wide, to - from, wide, 0, gv + (j0 + j) * wide, wide);
        attention_product(slopes, q + row * wide, wide, to - from, wide, 0, gk + (j0 + j) * wide, wide);
    }
}

/* Of one head: gq [tokens, heads, channels] of the sample, and gk and gv [prefix + tokens, channels up to 16], this head's
 * part. g and out are as gq, lse is [tokens]. scratch: attention_scratch. */
static void attention_backward(const Attention *call, int64_t sample, int64_t head, const float *packed, int64_t size,
                               float *scratch, const float *g, const float *out, const float *lse, float *gq, float *gk,
                               float *gv) {
    enum { QUERIES = ATTENTION_QUERIES_BACKWARD, PANEL = ATTENTION_PANEL };
    const Mask mask = mask_of(call, sample);
    const int64_t start = call->bounds[sample], tokens = call->bounds[sample + 1] - start, channels = call->channels;
    const int64_t wide = whole_chunks(channels), row = call->heads * channels, at = start * row + head * channels;
    const float *from = call->q.data + start * call->q.token + head * call->q.head, *keys = packed + 2 * size;
    const int direct = wide == channels; /* sums of gq where they are wanted; else they are wider */
    const int64_t sums_row = direct ? row : wide;
    float *q = scratch, *gs = q + QUERIES * wide, *p = gs + 2 * QUERIES * wide, *ds = p + QUERIES * STRIDE, deltas[QUERIES];
    memset(gk, 0, (size_t)((call->prefix + tokens) * wide) * sizeof(float));
    memset(gv, 0, (size_t)((call->prefix + tokens) * wide) * sizeof(float));
    for (int64_t t0 = 0; t0 < tokens; t0 += QUERIES) {
        const int64_t t1 = smaller(t0 + QUERIES, tokens), end = end_key(&mask, t1 - 1);
        float *sums = direct ? gq + at + t0 * row : gs + QUERIES * wide;
        int fresh = 1;
        copy_channels(from + t0 * call->q.token, call->q.token, t1 - t0, channels, q);
        copy_channels(g + at + t0 * row, row, t1 - t0, channels, gs);
        for (int64_t t = t0; t < t1; t++) deltas[t - t0] = dot(g + at + t * row, out + at + t * row, channels);
        for (int64_t j = 0; j < end; j += PANEL) {
            const int64_t n = smaller(PANEL, end - j);
            if (all_masked(&mask, t0, j, PANEL)) continue;
            for (int64_t t = t0; t < t1; t += ROWS) {
                const int64_t m = smaller(ROWS, t1 - t), i = t - t0, seen = smaller(n, end_key(&mask, t + m - 1) - j);
                const Left queries = {q + i * wide, wide, 1, m}, slopes = {gs + i * wide, wide, 1, m};
                const Left weights = {ds + i * STRIDE, STRIDE, 1, m};
                if (seen > 0) {
                    attention_product(queries, packed + j * channels, PANEL, channels, seen, 1, p + i * STRIDE, STRIDE);
                    attention_product(slopes, packed + size + j * channels, PANEL, channels, seen, 1, ds + i * STRIDE,
                                      STRIDE);
                }
                for (int64_t r = i; r < i + m; r++)
                    softmax_row_backward(&mask, t0 + r, j, n, (float)call->scale, lse[start + t0 + r], deltas[r],
                                         p + r * STRIDE, ds + r * STRIDE);
                if (seen > 0)
                    attention_product(weights, keys + j * wide, wide, seen, wide, fresh, sums + i * sums_row, sums_row);
            }
            fresh = 0;
            add_key_gradients(&mask, t0, t1, j, n, p, ds, q, gs, wide, gk, gv);
        }
        for (int64_t t = t0; t < t1 && !direct; t++)
            memcpy(gq + at + t * row, sums + (t - t0) * wide, (size_t)channels * sizeof(float));
    }
}

static const VarlenAttention varlen_attention = {pack_keys_values, attention_forward, attention_backward};

#endif
