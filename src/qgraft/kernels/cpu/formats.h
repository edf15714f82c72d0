/* The formats that the loops read, and how many bytes their rows have. The bits are read in unpack.h, unpack_vec.h and
 * codes.h. */

#ifndef QGRAFT_FORMATS_H
#define QGRAFT_FORMATS_H

#include <stdint.h>

#include "common.h"

/* As FORMAT_IDS of abi.py. */
enum {
    Q4_0 = 0, Q4_1 = 1, Q5_0 = 2, Q5_1 = 3, Q8_0 = 4, ROW_INT8 = 5, ROW_INT4 = 6, F16 = 7, BF16 = 8,
    Q4_K = 9, Q5_K = 10, Q6_K = 11,
    IQ4_NL = 12, IQ4_XS = 13, MXFP4 = 14, NVFP4 = 15,
    Q2_K = 16, Q3_K = 17, TQ1_0 = 18, TQ2_0 = 19, /* from here on: chunks.h */
    IQ1_S = 20, IQ1_M = 21, IQ2_XXS = 22, IQ2_XS = 23, IQ2_S = 24, IQ3_XXS = 25, IQ3_S = 26,
    F32 = 27, /* for A and B of a LoRA */
};

/* Formats whose codes are read in plain C on every level, 32 at a time (chunks.h). */
ALWAYS_INLINE int is_chunked(int format) { return format >= Q2_K && format <= IQ3_S; }

/* Expands to a switch that calls CALL(format) with `format` a constant, so that each call is compiled for its own; those of
 * `is_chunked` share one, which takes most of its time to read the codes. */
#define FOR_FORMAT(format, CALL)        \
    switch (format) {                   \
        case Q4_0: CALL(Q4_0); break;   \
        case Q4_1: CALL(Q4_1); break;   \
        case Q5_0: CALL(Q5_0); break;   \
        case Q5_1: CALL(Q5_1); break;   \
        case Q8_0: CALL(Q8_0); break;   \
        case ROW_INT8: CALL(ROW_INT8); break; \
        case ROW_INT4: CALL(ROW_INT4); break; \
        case F16: CALL(F16); break;     \
        case BF16: CALL(BF16); break;   \
        case F32: CALL(F32); break;     \
        case Q4_K: CALL(Q4_K); break;   \
        case Q5_K: CALL(Q5_K); break;   \
        case Q6_K: CALL(Q6_K); break;   \
        case IQ4_NL: CALL(IQ4_NL); break; \
        case IQ4_XS: CALL(IQ4_XS); break; \
        case MXFP4: CALL(MXFP4); break; \
        case NVFP4: CALL(NVFP4); break; \
        default:                        \
            if (is_chunked(format)) CALL(format); \
    }

/* The same for formats of codes (`has_codes`). */
#define FOR_CODES(format, CALL)         \
    switch (format) {                   \
        case Q4_0: CALL(Q4_0); break;   \
        case Q4_1: CALL(Q4_1); break;   \
        case Q5_0: CALL(Q5_0); break;   \
        case Q5_1: CALL(Q5_1); break;   \
        case Q8_0: CALL(Q8_0); break;   \
        case ROW_INT8: CALL(ROW_INT8); break; \
        case ROW_INT4: CALL(ROW_INT4); break; \
        case Q4_K: CALL(Q4_K); break;   \
        case Q5_K: CALL(Q5_K); break;   \
        case Q6_K: CALL(Q6_K); break;   \
        case IQ4_NL: CALL(IQ4_NL); break; \
        case IQ4_XS: CALL(IQ4_XS); break; \
        case MXFP4: CALL(MXFP4); break; \
        case NVFP4: CALL(NVFP4); break; \
    }

/* Bytes of `columns` weights of one row, -1 for an unknown format. */
ALWAYS_INLINE int64_t row_bytes(int format, int64_t columns) {
    switch (format) {
        case Q4_0: return columns / 32 * 18;
        case Q4_1: return columns / 32 * 20;
        case Q5_0: return columns / 32 * 22;
        case Q5_1: return columns / 32 * 24;
        case Q8_0: return columns / 32 * 34;
        case ROW_INT8: return columns;
        case ROW_INT4: return columns / 2;
        case F16: case BF16: return columns * 2;
        case F32: return columns * 4;
        case Q4_K: return columns / 256 * 144;
        case Q5_K: return columns / 256 * 176;
        case Q6_K: return columns / 256 * 210;
        case IQ4_NL: return columns / 32 * 18;
        case IQ4_XS: return columns / 256 * 136;
        case MXFP4: return columns / 32 * 17;
        case NVFP4: return columns / 64 * 36;
        case Q2_K: return columns / 256 * 84;
        case Q3_K: case IQ3_S: return columns / 256 * 110;
        case TQ1_0: return columns / 256 * 54;
        case TQ2_0: case IQ2_XXS: return columns / 256 * 66;
        case IQ1_S: return columns / 256 * 50;
        case IQ1_M: return columns / 256 * 56;
        case IQ2_XS: return columns / 256 * 74;
        case IQ2_S: return columns / 256 * 82;
        case IQ3_XXS: return columns / 256 * 98;
    }
    return -1;
}

/* Blocks of 256 weights in chunks of 32 whose scales are read beforehand, K_SCALES floats of them. */
ALWAYS_INLINE int is_k_quant(int format) {
    return format == Q4_K || format == Q5_K || format == Q6_K || is_chunked(format);
}
enum { K_SCALES = 32 };

/* Codes of 4 bits that are places among 16 levels. */
ALWAYS_INLINE int is_codebook(int format) { return format >= IQ4_NL && format <= NVFP4; }

/* Scales of each 16 columns. */
ALWAYS_INLINE int has_half_scales(int format) { return format == Q6_K || format == NVFP4; }

/* Formats that are codes times scales, with codes that vectors read: all but floats and what is read in chunks. */
ALWAYS_INLINE int has_codes(int format) {
    return format != F32 && format != F16 && format != BF16 && !is_chunked(format);
}

/* Whether a minimum is added. */
ALWAYS_INLINE int has_minimum(int format) {
    return format == Q4_1 || format == Q5_1 || format == Q4_K || format == Q5_K || format == Q2_K;
}

/* Whether there are products in 8-bit integers for the format, on every level (gemm_int8.h, gemm_int8_panels.h); and input
 * gradients, on AVX2, which for codes of 8 bits float32 is faster at. */
ALWAYS_INLINE int has_int8(int format) { return has_codes(format); }
ALWAYS_INLINE int has_int8_gradient(int format) {
    return has_codes(format) && format != Q8_0 && format != ROW_INT8 && format != IQ4_NL && format != IQ4_XS;
}

/* Groups of 32 columns that a row of x has in 8 bits (quantize_x.h): a multiple of 8, as scales are read. */
ALWAYS_INLINE int64_t groups_of(int64_t columns) { return (columns + 255) / 256 * 8; }

#endif
