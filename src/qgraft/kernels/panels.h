/* y = x W^T and gx = g W in float32 for many rows: panels of packed weights are unpacked into the first-level cache and
 * multiplied there.
 *
 *     out[t][n] = sum over k of in[t][k] panel[k][n]      forward: k columns of W, n rows;   backward: k rows, n columns
 *
 * A panel is 128 by 64 weights. Tiles of 6 rows of `in` pass over it: their sums, 6 by 64 (AVX2: 6 by 16), stay in
 * registers while k goes by, and each number of `in` is broadcast once for all of the tile's n. The order of each sum is
 * that of k, whatever the number of tokens and threads. Tiles at an edge compute their last token again instead of
 * having code of their own.
 */

enum { DEPTH = 128, WIDTH = 64, TOKENS = 6, VECTORS = LANES == 16 ? 4 : 2 };

/* Columns from 32 * chunk on, `chunks` (1 or 2) times 32 of them, of rows r0 <= r < r1, to panel[(r - r0) * WIDTH]. */
ALWAYS_INLINE void unpack_rows(const int format, const Product *of, int64_t chunk, int64_t chunks, int64_t r0, int64_t r1,
                               float *panel) {
    for (int64_t r = r0; r < r1; r++, panel += WIDTH) {
        const uint8_t *row = of->data + r * of->stride;
        float sub[16];
        if (has_sub(format)) read_sub(format, row + row_bytes(format, chunk / 8 * 256), sub);
        for (int64_t c = chunk; c < chunk + chunks; c++) {
            V w[PARTS];
            weights32(format, row, c, of->scales ? of->scales[r] : 1.0f, sub, w);
            for (int i = 0; i < PARTS; i++) v_store(panel + 32 * (c - chunk) + LANES * i, w[i]);
        }
    }
}

/* Columns of the chunks c0 <= c < c1 (at most 4, of the same 8) of 64 rows from r0 on, to panel[column * WIDTH + r - r0]. */
ALWAYS_INLINE void unpack_columns(const int format, const Product *of, int64_t r0, int64_t c0, int64_t c1, float *panel) {
    _Alignas(64) float some[16][DEPTH];
    const int64_t n = 32 * (c1 - c0);
    for (int64_t r = r0; r < r0 + WIDTH; r += 16, panel += 16) {
        for (int i = 0; i < 16; i++) {
            const uint8_t *row = of->data + (r + i) * of->stride;
            float sub[16];
            if (has_sub(format)) read_sub(format, row + row_bytes(format, c0 / 8 * 256), sub);
            for (int64_t c = c0; c < c1; c++) {
                V w[PARTS];
                weights32(format, row, c, of->scales ? of->scales[r + i] : 1.0f, sub, w);
                for (int v = 0; v < PARTS; v++) v_store(some[i] + 32 * (c - c0) + LANES * v, w[v]);
            }
        }
        for (int64_t j = 0; j < n; j++)
            for (int i = 0; i < 16; i++) panel[j * WIDTH + i] = some[i][j];
    }
}

typedef struct {
    const float *in; /* of token t at in + t * in_stride */
    float *out;
    int64_t in_stride, out_stride, m;
} Tokens;

/* out[t][n] += sum over 0 <= k < depth of in[t][k] panel[k][n], or = where fresh; t0 <= t < t0 + 6, N vectors of n. */
ALWAYS_INLINE void panel_tile(const int N, const float *panel, int64_t depth, int fresh, const Tokens *of, int64_t t0) {
    const float *in[TOKENS];
    float *out[TOKENS];
    V sums[TOKENS][VECTORS]; /* N of them */
    for (int t = 0; t < TOKENS; t++) {
        const int64_t at = t0 + t < of->m ? t0 + t : of->m - 1;
        in[t] = of->in + at * of->in_stride;
        out[t] = of->out + at * of->out_stride;
    }
#pragma GCC unroll 6
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) sums[t][v] = fresh ? v_zero() : v_load(out[t] + LANES * v);
    for (int64_t k = 0; k < depth; k++, panel += WIDTH) {
        V w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) w[v] = v_load(panel + LANES * v);
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; t++) {
            const V value = v_set(in[t][k]);
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) sums[t][v] = v_fma(value, w[v], sums[t][v]);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < TOKENS; t++)
        if (t0 + t < of->m)
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) v_store(out[t] + LANES * v, sums[t][v]);
}

/* All tokens over one panel of `width` (32 or 64) n. */
static void panel_product(const float *panel, int64_t depth, int64_t width, int fresh, Tokens of) {
    const int64_t step = LANES * (width == WIDTH ? VECTORS : 2);
    for (int64_t n = 0; n < width; n += step, panel += step, of.out += step)
        for (int64_t t = 0; t < of.m; t += TOKENS) {
            if (width == WIDTH) panel_tile(VECTORS, panel, depth, fresh, &of, t);
            else panel_tile(2, panel, depth, fresh, &of, t);
        }
}

/* As small (small.h), for many rows of x and 64 rows of W; fewer are left to small. */
static void forward(const Product *of, const float *x) {
    _Alignas(64) float panel[DEPTH * WIDTH];
    if (of->last - of->first < WIDTH) {
        small(of, x);
        return;
    }
    for (int64_t c = 0; c < of->columns / 32; c += 4) {
        const int64_t c1 = c + 4 < of->columns / 32 ? c + 4 : of->columns / 32;
#define UNPACK(FORMAT) unpack_columns(FORMAT, of, of->first, c, c1, panel)
        FOR_FORMAT(of->format, UNPACK)
#undef UNPACK
        const Tokens tokens = {x + 32 * c, of->y + of->first, of->columns, of->rows, of->m};
        panel_product(panel, 32 * (c1 - c), WIDTH, c == 0, tokens);
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
static void backward(const Product *of, const float *g) {
    _Alignas(64) float panel[DEPTH * WIDTH];
    const int64_t chunks = (of->last - of->first) / 32;
    for (int64_t r = 0; r < of->rows && chunks > 0; r += DEPTH) {
        const int64_t r1 = r + DEPTH < of->rows ? r + DEPTH : of->rows;
#define UNPACK(FORMAT) unpack_rows(FORMAT, of, of->first / 32, chunks, r, r1, panel)
        FOR_FORMAT(of->format, UNPACK)
#undef UNPACK
        const Tokens tokens = {g + r, of->y + of->first, of->rows, of->columns, of->m};
        panel_product(panel, r1 - r, 32 * chunks, r == 0, tokens);
    }
    if (of->last == of->columns && of->columns % 32) backward_rest(of, g);
}
