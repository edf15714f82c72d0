/* All loops of a level of vectors, compiled for the CPU that the including file names. */

#ifndef QGRAFT_VECTOR_LEVEL_H
#define QGRAFT_VECTOR_LEVEL_H

#include "decode_attention.h"
#include "descend.h"
#include "gemm.h"
#include "gemv.h"
#include "level.h"
#include "low_rank.h"
#include "pointwise.h"
#include "quantize_x.h"
#include "unpack_vec.h"
#include "varlen_attention.h"

/* What every such level has. */
#define VECTOR_LEVEL(NAME, GEMV, INT8)                                                                                 \
    .name = NAME, .unpack_row = unpack_row, .unpack_row_bf16 = unpack_row_bf16, .gemv = GEMV,                          \
    .many = MANY, .block_columns = BLOCK_COLUMNS, .block_tokens = BLOCK_TOKENS, .gemm = gemm,                          \
    .gemm_grad_input = gemm_grad_input, .low_rank = &low_rank, .quantize_x = quantize_x, .gemm_int8 = INT8,            \
    .pointwise = &pointwise, .decoding = &decoding, .attention = &varlen_attention,         \
    .descend = descend

#endif
