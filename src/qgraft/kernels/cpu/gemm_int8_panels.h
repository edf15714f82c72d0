/* AVX2: y = x W^T and gx = g W for many rows of x or g, in 8-bit integers: codes of W times codes of x or g (int8_panels.h).
 *
 *     forward    y  = sum over groups of 32 columns:  d * step * (integer sum of q * code)  +  m * sum          quantize_x.h
 *     backward   gx = sum over groups of 32 rows:         step * (integer sum of q * code)  +  sum of g * m
 *
 * with w = d * q + m. Backward the scales d stand inside of the sum. So what is rounded to codes is v = g * d, for each chunk
 * of columns anew, 32 rows with one step: max |g| max |d| / 127. That must be quick, being done once for 32 multiply-adds: g
 * is divided by its largest and rounded to 16 bits once for all columns, d likewise once for all tokens, and v is the upper half
 * of products of these integers. The step max |v| / 127 would be some 1.4 times smaller, but looking for it took a quarter of
 * the time of the whole.
 *
 * What x or g is rounded to is kept for 8 tokens at a time: a lane for each, 4 bytes deep. Tiles of 4 tokens and 16 numbers
 * of the result keep their sums of 16 bits in registers; those in float32, one for each step, pass through the first-level
 * cache. A step of 32 for 8 numbers of a token takes some 20 instructions instead of 32 multiply-adds in float32.
 *
 * The order of each sum is that of the steps, whatever the number of tokens and threads.
 */

#ifndef QGRAFT_GEMM_INT8_PANELS_H
#define QGRAFT_GEMM_INT8_PANELS_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "formats.h"
#include "gemm.h"
#include "int8_panels.h"
#include "level.h"
#include "panels.h"
#include "vec.h"

enum { OCTET = 8, INT8_TILE = 4 };

/* 8 tokens, STEPS steps deep: codes + 128 of 4 numbers in the lane of each token. */
typedef struct {
    __m256i codes[STEPS * 8];
    vfloat steps[STEPS], sums[STEPS]; /* sums: forward */
} Octet;

/* Where a tile is written: of token t at out + t * stride, the first `width` of 16 numbers, of the first `tokens` tokens. */
typedef struct {
    float *out;
    int64_t stride, width, tokens;
    int fresh;
} TileOut;

/* One step of a tile of 4 tokens from t0 on: adds to sums [4][INT8_VECTORS]. */
ALWAYS_INLINE void int8_step(const int parts, const int forward, const int has_m, const Int8Panel *panel, const Octet *x,
                             int step, int t0, vfloat *sums) {
    enum { T = INT8_TILE, N = INT8_VECTORS };
    const int count = part_count(parts), depth = part_depth(parts);
    const int32_t *codes = (const int32_t *)(x->codes + 8 * step) + t0;
    const float *steps = (const float *)(x->steps + step) + t0, *group_sums = (const float *)(x->sums + step) + t0;
#pragma GCC unroll 2
    for (int part = 0; part < count; part++) {
        const __m256i *w = panel->codes + (step * count + part) * depth * N;
        const __m256i *starts = panel->starts + (step * count + part) * N;
        const vfloat *d = panel->d + (step * count + part) * N;
        const int first = parts == HALVES ? 4 * part : 0;
        __m256i pairs[T][N];
#pragma GCC unroll 8
        for (int k = 0; k < depth; k++)
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const __m256i code = _mm256_set1_epi32(codes[8 * (first + k) + t]);
#pragma GCC unroll 2
                for (int v = 0; v < N; v++) {
                    pairs[t][v] = _mm256_add_epi16(k ? pairs[t][v] : starts[v], _mm256_maddubs_epi16(code, w[k * N + v]));
                    __asm__("" : "+x"(pairs[t][v])); /* or gcc makes a tree of the sum, whose leaves fit no registers */
                }
            }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const vfloat scale = v_set(steps[t]);
#pragma GCC unroll 2
            for (int v = 0; v < N; v++) {
                const vfloat sum = v_int(_mm256_madd_epi16(pairs[t][v], _mm256_set1_epi16(1)));
                sums[t * N + v] = v_fma(sum, forward ? v_mul(d[v], scale) : scale, sums[t * N + v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T && has_m; t++)
#pragma GCC unroll 2
        for (int v = 0; v < N; v++)
            sums[t * N + v] = v_fma(panel->m[step * N + v], v_set(group_sums[t]), sums[t * N + v]);
}

/* A tile of 4 tokens from t0 on of the octet. `minimums`: backward, what is added to all numbers of each token, or NULL. */
ALWAYS_INLINE void int8_panel_tile(const int parts, const int forward, const int has_m, const Int8Panel *panel,
                                   const Octet *x, int64_t steps, int t0, const float *minimums, const TileOut *to) {
    _Alignas(32) vfloat sums[INT8_TILE * INT8_VECTORS];
    for (int k = 0; k < INT8_TILE * INT8_VECTORS; k++) sums[k] = minimums ? v_set(minimums[t0 + k / INT8_VECTORS]) : v_zero();
    for (int step = 0; step < steps; step++) int8_step(parts, forward, has_m, panel, x, step, t0, sums);
    for (int t = 0; t < INT8_TILE && t0 + t < to->tokens; t++) {
        float *out = to->out + (t0 + t) * to->stride;
        if (to->width == INT8_WIDTH) {
            for (int v = 0; v < INT8_VECTORS; v++) {
                const vfloat sum = sums[t * INT8_VECTORS + v];
                v_store(out + LANES * v, to->fresh ? sum : _mm256_add_ps(v_load(out + LANES * v), sum));
            }
            continue;
        }
        const float *sum = (const float *)(sums + t * INT8_VECTORS);
        for (int j = 0; j < to->width; j++) out[j] = to->fresh ? sum[j] : out[j] + sum[j];
    }
}

/* All tokens of an octet over one panel. */
static void forward_panel(int parts, int has_m, const Int8Panel *panel, const Octet *x, int64_t steps, const TileOut *to) {
    for (int t = 0; t < to->tokens; t += INT8_TILE) {
        if (parts == ONE_PART && has_m) int8_panel_tile(ONE_PART, 1, 1, panel, x, steps, t, NULL, to);
        else if (parts == ONE_PART) int8_panel_tile(ONE_PART, 1, 0, panel, x, steps, t, NULL, to);
        else if (parts == HALVES) int8_panel_tile(HALVES, 1, 0, panel, x, steps, t, NULL, to);
        else int8_panel_tile(PLANES, 1, 0, panel, x, steps, t, NULL, to);
    }
}

static void backward_panel(int parts, const Int8Panel *panel, const Octet *x, int64_t steps, const float *minimums,
                           const TileOut *to) {
    for (int t = 0; t < to->tokens; t += INT8_TILE) {
        if (parts == ONE_PART) int8_panel_tile(ONE_PART, 0, 0, panel, x, steps, t, minimums, to);
        else int8_panel_tile(HALVES, 0, 0, panel, x, steps, t, minimums, to);
    }
}

/* Groups g0 <= g < g1 of the tokens from t on, as an octet. */
ALWAYS_INLINE void octet_of_x(const QuantizedX *x, int64_t m, int64_t t, int64_t g0, int64_t g1, Octet *to) {
    for (int64_t g = g0; g < g1; g++) {
        vfloat rows[OCTET];
        float *steps = (float *)(to->steps + g - g0), *sums = (float *)(to->sums + g - g0);
        for (int i = 0; i < OCTET; i++) {
            const int64_t at = smaller(t + i, m - 1) * x->groups + g;
            rows[i] = _mm256_castsi256_ps(_mm256_xor_si256(i_load(x->codes + 32 * at), i_set8((char)128)));
            steps[i] = x->steps[at], sums[i] = x->sums[at];
        }
        v_transpose(rows);
        for (int k = 0; k < 8; k++) to->codes[8 * (g - g0) + k] = _mm256_castps_si256(rows[k]);
    }
}

enum { OCTETS = BLOCK_TOKENS / OCTET };

/* Rows p->first <= r < p->last for at most BLOCK_TOKENS tokens. */
static void gemm_int8_panels(const Product *p, const QuantizedX *x) {
    Octet octets[OCTETS];
    Int8Panel panel;
    const int64_t groups = (p->columns + 31) / 32;
    for (int64_t c = 0; c < groups; c += STEPS) {
        const int64_t c1 = smaller(c + STEPS, groups);
        for (int64_t t = 0; t < p->m; t += OCTET) octet_of_x(x, p->m, t, c, c1, octets + t / OCTET);
        for (int64_t r = p->first; r < p->last; r += INT8_WIDTH) {
#define PACK(FORMAT) pack_int8_columns(FORMAT, p, r, p->last, c, c1, &panel)
            FOR_CODES(p->format, PACK)
#undef PACK
            for (int64_t t = 0; t < p->m; t += OCTET) {
                const TileOut to = {p->y + t * p->rows + r, p->rows, smaller(p->last - r, INT8_WIDTH), smaller(p->m - t, OCTET),
                                    c == 0};
                forward_panel(parts_of(p->format), has_minimum(p->format), &panel, octets + t / OCTET, c1 - c, &to);
            }
        }
    }
}

/* g of 8 tokens, STEPS steps deep, as integers up to LARGEST_G and their steps: rows 4 i and 4 i + 2 in the lane of each token,
 * then rows 4 i + 1 and 4 i + 3. */
typedef struct {
    __m256i g[16 * STEPS];
    vfloat steps[STEPS];
} GradOctet;

/* 32 rows of g -> integers; their step. As quantize_x.h has it: 0 below 2^-100, NaN where a number is not finite. */
ALWAYS_INLINE vfloat round_g(const vfloat *g, __m256i *to) {
    const vfloat all = v_set((float)LARGEST_G);
    __m256i largest[2] = {i_zero(), i_zero()};
    for (int j = 0; j < 32; j++) largest[j % 2] = larger_magnitude(largest[j % 2], g[j]);
    const vfloat most = v_bits(_mm256_max_epi32(largest[0], largest[1]));
    const vfloat enough = _mm256_cmp_ps(most, v_set(0x1p-100f), _CMP_NLT_UQ);
    const vfloat inverse = _mm256_and_ps(_mm256_div_ps(all, most), enough);
    for (int k = 0; k < 8; k++) {
        __m256i code[4];
        for (int i = 0; i < 4; i++) code[i] = _mm256_cvtps_epi32(v_mul(g[4 * k + i], inverse));
        for (int i = 0; i < 2; i++) to[2 * k + i] = _mm256_blend_epi16(code[i], _mm256_slli_epi32(code[i + 2], 16), 0xaa);
    }
    return _mm256_add_ps(_mm256_and_ps(_mm256_div_ps(most, all), enough), _mm256_sub_ps(most, most));
}

/* Rows r0 <= r < r1 of the tokens from t on, zeros up to a whole step. */
ALWAYS_INLINE void octet_of_g(const Product *p, const float *g, int64_t t, int64_t r0, int64_t r1, GradOctet *to) {
    const float *token[OCTET];
    for (int i = 0; i < OCTET; i++) token[i] = g + smaller(t + i, p->m - 1) * p->rows;
    for (int64_t r = r0; r < r1; r += 32) {
        vfloat rows[32];
        for (int64_t j = 0; j < 32; j += OCTET) {
            for (int i = 0; i < OCTET; i++) {
                float rest[OCTET] = {0};
                const int64_t left = r1 - r - j;
                if (left > 0 && left < OCTET) memcpy(rest, token[i] + r + j, (size_t)left * sizeof(float));
                rows[j + i] = v_load(left < OCTET ? rest : token[i] + r + j);
            }
            v_transpose(rows + j);
        }
        to->steps[(r - r0) / 32] = round_g(rows, to->g + (r - r0) / 2);
    }
}

/* 4 bytes, of which a pair of scales is made, in all lanes. */
ALWAYS_INLINE __m256i pair_of(const int16_t *scales) {
    int32_t pair;
    memcpy(&pair, scales, 4);
    return i_set(pair);
}

/* g times the scales of a chunk, rounded: an octet of `steps` steps; and the sums of g * m of each token where there are
 * minimums. Products of integers are rounded to 16 bits, of which the upper 8 are the code; adding 0x80 rounds, 0x8000 makes it
 * code + 128. */
ALWAYS_INLINE void quantize_g(const int has_m, const GradOctet *from, const RowScales *scales, int half, int64_t steps,
                              Octet *to, vfloat *minimums) {
    const __m256i up = _mm256_set1_epi16((int16_t)0x8080), upper = _mm256_set1_epi16((int16_t)0xff00);
    *minimums = v_zero();
    for (int64_t step = 0; step < steps; step++) {
        const __m256i *g = from->g + 16 * step;
        const int16_t *d = scales->d[half] + 32 * step, *m = scales->m + 32 * step;
        __m256i sums[2] = {i_zero(), i_zero()};
        to->steps[step] = v_mul(from->steps[step], v_set(0x1p23f * scales->d_step[half][step]));
#pragma GCC unroll 4
        for (int k = 0; k < 8; k++, g += 2, d += 4, m += 4) {
            const __m256i first = _mm256_add_epi16(_mm256_mulhrs_epi16(g[0], pair_of(d)), up);
            const __m256i second = _mm256_add_epi16(_mm256_mulhrs_epi16(g[1], pair_of(d + 2)), up);
            to->codes[8 * step + k] = _mm256_or_si256(_mm256_srli_epi16(first, 8), _mm256_and_si256(second, upper));
            for (int i = 0; i < 2 && has_m; i++)
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(g[i], pair_of(m + 2 * i)));
        }
        const vfloat m_step = v_mul(from->steps[step], v_set(scales->m_step[step]));
        if (has_m) *minimums = v_fma(v_int(_mm256_add_epi32(sums[0], sums[1])), m_step, *minimums);
    }
}

/* gx (p->y) in the columns p->first <= j < p->last, from a whole chunk on, for at most BLOCK_TOKENS tokens. */
static void gemm_grad_input_int8(const Product *p, const float *g) {
    GradOctet octets[OCTETS];
    Int8Panel panels[2];
    RowScales scales;
    const int parts = parts_of(p->format), has_m = has_minimum(p->format);
    for (int64_t r = 0; r < p->rows; r += 32 * STEPS) {
        const int64_t r1 = smaller(r + 32 * STEPS, p->rows), steps = (r1 - r + 31) / 32;
        for (int64_t t = 0; t < p->m; t += OCTET) octet_of_g(p, g, t, r, r1, octets + t / OCTET);
        for (int64_t c = p->first / 32; 32 * c < p->last; c++) {
#define PACK(FORMAT) if (has_int8_gradient(FORMAT)) pack_int8_rows(FORMAT, p, r, r1, c, panels, &scales)
            FOR_CODES(p->format, PACK)
#undef PACK
            for (int64_t t = 0; t < p->m; t += OCTET) {
                const GradOctet *from = octets + t / OCTET;
                Octet octet;
                vfloat minimums;
                for (int half = 0; half < 2; half++) {
                    const int64_t j = 32 * c + INT8_WIDTH * half;
                    const TileOut to = {p->y + t * p->columns + j, p->columns, smaller(p->last - j, INT8_WIDTH),
                                        smaller(p->m - t, OCTET), r == 0};
                    if (to.width <= 0) break;
                    if (half == 0 || has_half_scales(p->format)) {
                        if (has_m) quantize_g(1, from, &scales, half, steps, &octet, &minimums);
                        else quantize_g(0, from, &scales, half, steps, &octet, &minimums);
                    }
                    backward_panel(parts, panels + half, &octet, steps, has_m ? (const float *)&minimums : NULL, &to);
                }
            }
        }
    }
}

#endif
