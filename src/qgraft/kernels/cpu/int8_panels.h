/* AVX2: packed weights as 8-bit integers, in the order in which 8-bit products of many rows (gemm_int8_panels.h) pass over them.
 *
 * vpmaddubsw multiplies 32 unsigned with 32 signed bytes and adds pairs in 16 bits. So the lanes of a register, 8 of 32 bits, are
 * 8 numbers of the result, and the 4 bytes of a lane are 4 numbers deep:
 *
 *     forward    a register holds columns 4 i to 4 i + 3 of 8 rows of W        8 of them: a step of 32 columns
 *     backward   a register holds rows 4 i to 4 i + 3 of 8 columns of W        8 of them: a step of 32 rows
 *
 * x, 4 bytes of it in all lanes, is the unsigned factor: code + 128, -127 <= code <= 127. Those of W are signed. Where the format
 * has minimums its codes are not, so half of their range is taken off and d times it added to the minimum, which also makes
 * the rounding of the other factor matter less: -8 to 7 of 4 bits, -16 to 15 of 5, -32 to 31 of 6.
 *
 * Sums stay in 16 bits for as many products as are safe there: 2 * 255 * 32 of one pair, and of a whole step
 * 32 / 2 * 127 * 16 = 32512 of 5 bits. What 128 adds to it is taken off by where the sum starts, and sums of 16 bits may
 * wrap around on the way. So a step of 4 or 5 bits is one part. Of 6 bits each half of a step is a part; codes of 8 bits
 * are split into 16 * high + low, of which each is a part.
 */

#ifndef QGRAFT_INT8_PANELS_H
#define QGRAFT_INT8_PANELS_H

#include <stdint.h>
#include <string.h>

#include "codes.h"
#include "common.h"
#include "formats.h"
#include "level.h"
#include "panels.h"
#include "vec.h"

/* A panel is STEPS steps deep and 16 numbers wide. */
enum { STEPS = 8, INT8_VECTORS = 2, INT8_WIDTH = INT8_VECTORS * LANES };

/* What a step of a format is made of. */
enum { ONE_PART, HALVES, PLANES };

typedef struct {
    __m256i codes[STEPS * 2 * 8 * INT8_VECTORS]; /* of each step, part, register, vector: see store_step */
    __m256i starts[STEPS * 2 * INT8_VECTORS];    /* -128 times the sums of pairs, of each part */
    vfloat d[STEPS * 2 * INT8_VECTORS], m[STEPS * INT8_VECTORS]; /* forward: of each part, of each step */
} Int8Panel;

ALWAYS_INLINE int parts_of(const int format) {
    if (format == Q8_0 || format == ROW_INT8 || format == IQ4_NL || format == IQ4_XS) return PLANES;
    return has_half_scales(format) ? HALVES : ONE_PART;
}
ALWAYS_INLINE int part_count(const int parts) { return parts == ONE_PART ? 1 : 2; }
ALWAYS_INLINE int part_depth(const int parts) { return parts == HALVES ? 4 : 8; } /* registers */

/* Half of the range of codes that start at 0: what is taken off them. */
ALWAYS_INLINE int middle_code(const int format) { return !has_minimum(format) ? 0 : format == Q4_1 || format == Q4_K ? 8 : 16; }

/* Signed codes of a row. `paired`: those of ROW_INT4 in the order in which quantize_x.h has x. */
ALWAYS_INLINE __m256i signed_codes(const int format, const int paired, const uint8_t *row, int64_t c) {
    if (format == ROW_INT4 && paired) {
        const __m256i sign = _mm256_set1_epi8(8);
        return _mm256_sub_epi8(_mm256_xor_si256(nibble_bytes(row + 16 * c), sign), sign);
    }
    const __m256i codes = codes32(format, row, c);
    return middle_code(format) ? _mm256_sub_epi8(codes, _mm256_set1_epi8((char)middle_code(format))) : codes;
}

/* The same for the `left` columns that fill no chunk, which only formats without blocks have: nothing beyond them is read. */
ALWAYS_INLINE __m256i last_codes(const int format, const int paired, const uint8_t *row, int64_t c, int64_t left) {
    uint8_t rest[32] = {0};
    if (format != ROW_INT8 && format != ROW_INT4) return _mm256_setzero_si256();
    memcpy(rest, row + row_bytes(format, 32 * c), (size_t)row_bytes(format, left));
    return signed_codes(format, paired, rest, 0);
}

ALWAYS_INLINE __m256i codes_of_row(const int format, const int paired, const Product *p, const uint8_t *row, int64_t c) {
    const int64_t left = p->columns - 32 * c;
    return left < 32 ? last_codes(format, paired, row, c, left) : signed_codes(format, paired, row, c);
}

/* Bytes -> 16 * high + low, -8 <= low <= 7, -8 <= high <= 8. */
ALWAYS_INLINE __m256i low_plane(__m256i codes) {
    const __m256i sign = _mm256_set1_epi8(8);
    return _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(codes, _mm256_set1_epi8(15)), sign), sign);
}
ALWAYS_INLINE __m256i high_plane(__m256i codes) {
    const __m256i low = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(8);
    const __m256i high = _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(codes, 4), low), sign), sign);
    return _mm256_sub_epi8(high, _mm256_cmpeq_epi8(_mm256_and_si256(codes, sign), sign));
}

/* Store the 8 registers of a step for vector v, and where its sums start. */
ALWAYS_INLINE void store_step(const int parts, const __m256i *registers, int step, int v, Int8Panel *panel) {
    const int depth = part_depth(parts);
    for (int part = 0; part < part_count(parts); part++) {
        const int64_t at = (step * part_count(parts) + part) * INT8_VECTORS;
        __m256i sum = _mm256_setzero_si256();
        for (int k = 0; k < depth; k++) {
            __m256i codes = registers[parts == HALVES ? 4 * part + k : k];
            if (parts == PLANES) codes = part ? high_plane(codes) : low_plane(codes);
            panel->codes[at * depth + k * INT8_VECTORS + v] = codes;
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8((char)128), codes));
        }
        panel->starts[at + v] = _mm256_sub_epi16(_mm256_setzero_si256(), sum);
    }
}

/* Forward: the columns of chunks c0 <= c < c1, of the same 256, of 16 rows from r on; those from `last` on are not wanted. */
ALWAYS_INLINE void pack_int8_columns(const int format, const Product *p, int64_t r, int64_t last, int64_t c0, int64_t c1,
                                     Int8Panel *panel) {
    const int parts = parts_of(format);
    for (int v = 0; v < INT8_VECTORS; v++) {
        EightRows rows = eight_rows(p, r + LANES * v, last);
        read_scales_of_rows(format, &rows, c0, c1);
        for (int64_t c = c0; c < c1; c++) {
            const int step = (int)(c - c0);
            vfloat codes[LANES];
            __m256i registers[LANES];
            for (int i = 0; i < LANES; i++) codes[i] = _mm256_castsi256_ps(codes_of_row(format, 1, p, rows.data[i], c));
            v_transpose(codes);
            for (int i = 0; i < LANES; i++) registers[i] = _mm256_castps_si256(codes[i]);
            store_step(parts, registers, step, v, panel);
            const ColumnScales scales = column_scales(format, &rows, c);
            vfloat *d = panel->d + step * part_count(parts) * INT8_VECTORS + v;
            d[0] = scales.d[0];
            if (parts == HALVES) d[INT8_VECTORS] = scales.d[1];
            if (parts == PLANES) d[INT8_VECTORS] = v_mul(scales.d[0], v_set(16.0f));
            if (has_minimum(format))
                panel->m[step * INT8_VECTORS + v] = v_fma(scales.d[0], v_set((float)middle_code(format)), scales.m);
        }
    }
}

/* What 32 scales and 32 minimums of rows are rounded to, and what they are worth: the first to LARGEST_D, the second to
 * LARGEST_M. Those of rows 4 i to 4 i + 3 stand in the order 0, 2, 1, 3. */
typedef struct {
    int16_t d[2][32 * STEPS], m[32 * STEPS]; /* d[1] of columns 16 to 31 */
    float d_step[2][STEPS], m_step[STEPS];
} RowScales;

enum { LARGEST_G = 32767, LARGEST_D = 32513, LARGEST_M = 2047 };

/* The magnitude that is largest in each lane, as integers: NaN > infinity > numbers. */
ALWAYS_INLINE __m256i larger_magnitude(__m256i largest, vfloat v) {
    return _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v), i_set(0x7fffffff)));
}

/* 32 numbers -> integers up to `most`, and their step, which is 0 where all are below 2^-100. */
ALWAYS_INLINE float round_scales(const vfloat values[4], float most, int16_t *to) {
    _Alignas(32) int32_t lanes[LANES];
    __m256i largest = i_zero(), code[4];
    float found;
    for (int i = 0; i < 4; i++) largest = larger_magnitude(largest, values[i]);
    _mm256_store_si256((__m256i *)lanes, largest);
    for (int i = 1; i < LANES; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    memcpy(&found, lanes, 4);
    const vfloat inverse = v_set(found < 0x1p-100f ? 0.0f : most / found);
    for (int i = 0; i < 4; i++) code[i] = _mm256_cvtps_epi32(v_mul(values[i], inverse));
    for (int i = 0; i < 2; i++) {
        const __m256i in_order = _mm256_permute4x64_epi64(_mm256_packs_epi32(code[2 * i], code[2 * i + 1]), 0xd8);
        const __m256i swapped = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(in_order, 0xd8), 0xd8);
        _mm256_storeu_si256((__m256i *)to + i, swapped);
    }
    return found < 0x1p-100f ? 0.0f : found / most;
}

/* Rows 4 i to 4 i + 3 of a chunk -> registers of 8 columns, 4 bytes of each: columns 0, 8, 16 and 24 on. */
ALWAYS_INLINE void interleave_rows(const __m256i *rows, __m256i *columns) {
    const __m256i a = _mm256_unpacklo_epi8(rows[0], rows[1]), b = _mm256_unpackhi_epi8(rows[0], rows[1]);
    const __m256i c = _mm256_unpacklo_epi8(rows[2], rows[3]), d = _mm256_unpackhi_epi8(rows[2], rows[3]);
    const __m256i first = _mm256_unpacklo_epi16(a, c), second = _mm256_unpackhi_epi16(a, c);
    const __m256i third = _mm256_unpacklo_epi16(b, d), fourth = _mm256_unpackhi_epi16(b, d);
    columns[0] = _mm256_permute2x128_si256(first, second, 0x20);
    columns[1] = _mm256_permute2x128_si256(third, fourth, 0x20);
    columns[2] = _mm256_permute2x128_si256(first, second, 0x31);
    columns[3] = _mm256_permute2x128_si256(third, fourth, 0x31);
}

/* Backward: chunk c of rows r0 <= r < r1 as two panels, of its columns 0 to 15 and 16 to 31, and their scales. From r1 on the
 * last row stands again: g is 0 there. */
ALWAYS_INLINE void pack_int8_rows(const int format, const Product *p, int64_t r0, int64_t r1, int64_t c, Int8Panel panels[2],
                                  RowScales *scales) {
    for (int step = 0; r0 + 32 * step < r1; step++) {
        __m256i registers[4][8];
        vfloat d[2][4], m[4];
        for (int e = 0; e < 4; e++) {
            EightRows rows = eight_rows(p, r0 + 32 * step + LANES * e, r1);
            read_scales_of_rows(format, &rows, c, c + 1);
            for (int k = 0; k < 2; k++) {
                __m256i codes[4], columns[4];
                for (int i = 0; i < 4; i++) codes[i] = codes_of_row(format, 0, p, rows.data[4 * k + i], c);
                interleave_rows(codes, columns);
                for (int v = 0; v < 4; v++) registers[v][2 * e + k] = columns[v];
            }
            const ColumnScales own = column_scales(format, &rows, c);
            d[0][e] = own.d[0], d[1][e] = own.d[1];
            m[e] = v_fma(own.d[0], v_set((float)middle_code(format)), own.m);
        }
        for (int half = 0; half < (has_half_scales(format) ? 2 : 1); half++)
            scales->d_step[half][step] = round_scales(d[half], LARGEST_D, scales->d[half] + 32 * step);
        if (has_minimum(format)) scales->m_step[step] = round_scales(m, LARGEST_M, scales->m + 32 * step);
        for (int v = 0; v < 4; v++) store_step(parts_of(format), registers[v], step, v % 2, panels + v / 2);
    }
}

#endif
