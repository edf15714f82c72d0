/* y = x W^T and gx = g W for many rows: panels of packed weights are unpacked into the first-level cache and multiplied
 * there.
 *
 *     out[t][n] = sum over k of in[t][k] panel[k][n]      forward: k columns of W, n rows;   backward: k rows, n columns
 *
 * A panel is 128 by 64 weights. Tiles of 6 rows of `in` pass over it: their sums, 6 by 64 (AVX2: 6 by 16), stay in
 * registers while k goes by, and each number of `in` is broadcast once for all of the tile's n. The order of each sum is
 * that of k, whatever the number of tokens and threads. Tiles at an edge compute their last token again instead of
 * having code of their own.
 *
 * In bfloat16 (PAIRS) two numbers, of k and k + 1, take the place of one float: `in` and panel hold pairs, which one
 * instruction multiplies and adds to a float32 sum, so depth halves and nothing else changes.
 */

enum { DEPTH = 128, WIDTH = 64, TOKENS = 6, VECTORS = LANES == 16 ? 4 : 2 };
enum { FLOATS = 0, PAIRS = 1 };

#if defined(__AVX512BF16__)
#define BF16_PAIRS(low, high) v_bf16_pairs(low, high)
#define BF16_ROW(w) v_bf16(w[0], w[1])
#define MULTIPLY_PAIRS v_fma_pairs
#else /* never called */
#define BF16_PAIRS(low, high) low
#define BF16_ROW(w) w[0]
#define MULTIPLY_PAIRS v_fma
#endif

/* Columns from 32 * chunk on, `chunks` (1 or 2) times 32 of them, of rows r0 <= r < r1, to panel[(r - r0) * WIDTH];
 * PAIRS: of rows r and r + 1 to panel[(r - r0) / 2 * WIDTH], with zeros beyond the last. */
ALWAYS_INLINE void unpack_rows(const int format, const int kind, const Product *of, int64_t chunk, int64_t chunks, int64_t r0,
                               int64_t r1, float *panel) {
    for (int64_t r = r0; r < r1; r += 1 + kind, panel += WIDTH) {
        const uint8_t *row = of->data + r * of->stride;
        const int64_t next = r + 1 < r1 ? of->stride : 0; /* PAIRS: to the second row */
        float sub[2][16];
        for (int i = 0; has_sub(format) && i <= kind; i++)
            read_sub(format, row + i * next + row_bytes(format, chunk / 8 * 256), sub[i]);
        for (int64_t c = chunk; c < chunk + chunks; c++) {
            V w[PARTS], second[PARTS];
            weights32(format, row, c, of->scales ? of->scales[r] : 1.0f, sub[0], w);
            if (kind == PAIRS && next)
                weights32(format, row + next, c, of->scales ? of->scales[r + 1] : 1.0f, sub[1], second);
            for (int i = 0; i < PARTS; i++) {
                if (kind == PAIRS) w[i] = BF16_PAIRS(w[i], next ? second[i] : v_zero());
                v_store(panel + 32 * (c - chunk) + LANES * i, w[i]);
            }
        }
    }
}

/* Columns of the chunks c0 <= c < c1 (at most 4, of the same 8) of 64 rows from r0 on, to panel[column * WIDTH + r - r0];
 * PAIRS: of columns j and j + 1 to panel[j / 2 * WIDTH + r - r0]. */
ALWAYS_INLINE void unpack_columns(const int format, const int kind, const Product *of, int64_t r0, int64_t c0, int64_t c1,
                                  float *panel) {
    for (int64_t r = r0; r < r0 + WIDTH; r += LANES, panel += LANES) {
        float sub[LANES][16];
        for (int i = 0; has_sub(format) && i < LANES; i++)
            read_sub(format, of->data + (r + i) * of->stride + row_bytes(format, c0 / 8 * 256), sub[i]);
        for (int64_t c = c0; c < c1; c++) {
            float *to = panel + (c - c0) * (kind == PAIRS ? 16 : 32) * WIDTH;
            V w[PARTS][LANES];
            for (int i = 0; i < LANES; i++) {
                V row[PARTS];
                weights32(format, of->data + (r + i) * of->stride, c, of->scales ? of->scales[r + i] : 1.0f, sub[i], row);
                if (kind == PAIRS) row[0] = BF16_ROW(row);
                for (int v = 0; v < PARTS; v++) w[v][i] = row[v];
            }
            for (int v = 0; v < (kind == PAIRS ? 1 : PARTS); v++) {
                transpose(w[v]);
                for (int j = 0; j < LANES; j++) v_store(to + (LANES * v + j) * WIDTH, w[v][j]);
            }
        }
    }
}

typedef struct {
    const float *in; /* of token t at in + t * in_stride */
    float *out;
    int64_t in_stride, out_stride, m;
} Tokens;

/* out[t][n] += sum over 0 <= k < depth of in[t][k] panel[k][n], or = where fresh; t0 <= t < t0 + T, N vectors of n. */
ALWAYS_INLINE void panel_tile(const int kind, const int T, const int N, const float *panel, int64_t stride, int64_t depth,
                              int fresh, const Tokens *of, int64_t t0) {
    const float *in[8];
    float *out[8];
    V sums[8][VECTORS]; /* T by N of them */
    for (int t = 0; t < T; t++) {
        const int64_t at = t0 + t < of->m ? t0 + t : of->m - 1;
        in[t] = of->in + at * of->in_stride;
        out[t] = of->out + at * of->out_stride;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) sums[t][v] = fresh ? v_zero() : v_load(out[t] + LANES * v);
    for (int64_t k = 0; k < depth; k++, panel += stride) {
        V w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) w[v] = v_load(panel + LANES * v);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const V value = v_set(in[t][k]); /* or a pair: 32 bits are moved, whatever they mean */
#pragma GCC unroll 4
            for (int v = 0; v < N; v++)
                sums[t][v] = kind == PAIRS ? MULTIPLY_PAIRS(value, w[v], sums[t][v]) : v_fma(value, w[v], sums[t][v]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
        if (t0 + t < of->m)
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) v_store(out[t] + LANES * v, sums[t][v]);
}

/* All tokens over one panel of `width` (32 or 64) n. */
ALWAYS_INLINE void panel_product(const int kind, const float *panel, int64_t depth, int64_t width, int fresh, Tokens of) {
    const int64_t step = LANES * (width == WIDTH ? VECTORS : 2);
    for (int64_t n = 0; n < width; n += step, panel += step, of.out += step)
        for (int64_t t = 0; t < of.m; t += TOKENS) {
            if (width == WIDTH) panel_tile(kind, TOKENS, VECTORS, panel, WIDTH, depth, fresh, &of, t);
            else panel_tile(kind, TOKENS, 2, panel, WIDTH, depth, fresh, &of, t);
        }
}

/* As small (small.h), for many rows of x and 64 rows of W; what fills no panel is left to small. `in` is x, or its pairs. */
ALWAYS_INLINE void forward_kind(const int kind, const Product *of, const float *x, const float *in) {
    _Alignas(64) float panel[DEPTH * WIDTH];
    const int64_t per = 1 + kind;
    if (of->last - of->first < WIDTH || of->columns < 32) {
        small(of, x);
        return;
    }
    for (int64_t c = 0; c < of->columns / 32; c += 4) {
        const int64_t c1 = c + 4 < of->columns / 32 ? c + 4 : of->columns / 32;
#define UNPACK(FORMAT) unpack_columns(FORMAT, kind, of, of->first, c, c1, panel)
        FOR_FORMAT(of->format, UNPACK)
#undef UNPACK
        const int64_t stride = (of->columns + kind) / per;
        const Tokens tokens = {in + 32 / per * c, of->y + of->first, stride, of->rows, of->m};
        panel_product(kind, panel, 32 / per * (c1 - c), WIDTH, c == 0, tokens);
    }
    if (of->columns % 32)
        for (int64_t r = of->first; r < of->last; r++) add_rest(of, x, r);
}

/* The columns of gx after the last whole chunk, which only formats without blocks have. */
static void backward_rest(const Product *of, const float *g) {
    const int64_t whole = of->columns / 32 * 32, rest = of->columns - whole;
    float w[32];
    for (int64_t r = 0; r < of->rows; r++) {
        plain_row(of->format, of->data + r * of->stride + row_bytes(of->format, whole), rest,
                  of->scales ? of->scales[r] : 1.0f, w);
        for (int64_t t = 0; t < of->m; t++) {
            float *gx = of->y + t * of->columns + whole;
            for (int64_t j = 0; j < rest; j++) gx[j] = (r ? gx[j] : 0.0f) + g[t * of->rows + r] * w[j];
        }
    }
}

/* gx [m, columns] (of->y) = g [m, rows] W, in the columns of->first <= j < of->last, of which there are at most 64. */
ALWAYS_INLINE void backward_kind(const int kind, const Product *of, const float *g, const float *in) {
    _Alignas(64) float panel[DEPTH * WIDTH];
    const int64_t chunks = (of->last - of->first) / 32, per = 1 + kind;
    for (int64_t r = 0; r < of->rows && chunks > 0; r += DEPTH) {
        const int64_t r1 = r + DEPTH < of->rows ? r + DEPTH : of->rows;
#define UNPACK(FORMAT) unpack_rows(FORMAT, kind, of, of->first / 32, chunks, r, r1, panel)
        FOR_FORMAT(of->format, UNPACK)
#undef UNPACK
        const int64_t stride = (of->rows + kind) / per;
        const Tokens tokens = {in + r / per, of->y + of->first, stride, of->columns, of->m};
        panel_product(kind, panel, (r1 - r + kind) / per, 32 * chunks, r == 0, tokens);
    }
    if (of->last == of->columns && of->columns % 32) backward_rest(of, g);
}

static void forward(const Product *of, const float *x) { forward_kind(FLOATS, of, x, x); }
static void backward(const Product *of, const float *g) { backward_kind(FLOATS, of, g, g); }

#if defined(__AVX512BF16__)

static void forward_bf16(const Product *of, const float *x, const float *pairs) { forward_kind(PAIRS, of, x, pairs); }
static void backward_bf16(const Product *of, const float *g, const float *pairs) { backward_kind(PAIRS, of, g, pairs); }

/* n floats -> (n + 1) / 2 pairs of bfloat16 numbers, the last with a zero where n is odd. */
static void round_pairs(const float *values, int64_t n, float *pairs) {
    const int64_t whole = n / 32 * 32;
    for (int64_t j = 0; j < whole; j += 32)
        v_store(pairs + j / 2, v_bf16(v_load(values + j), v_load(values + j + LANES)));
    if (whole < n) {
        float rest[32] = {0};
        memcpy(rest, values + whole, (size_t)(n - whole) * sizeof(float));
        const V last = v_bf16(v_load(rest), v_load(rest + LANES));
        memcpy(pairs + whole / 2, &last, (size_t)((n - whole + 1) / 2) * sizeof(float));
    }
}

#endif
