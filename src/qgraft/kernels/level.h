/* All loops of a level of vectors, compiled for the CPU that the including file names. */

#include "native.h"
#include "rows.h"
#include "attend.h"
#include "pointwise.h"
#include "activations.h"
#include "simd.h"
#include "small.h"
#include "panels.h"
#include "low_rank.h"
#include "samples.h"

/* What every such level has. */
#define LEVEL(NAME, INT8)                                                                                            \
    .name = NAME, .unpack_row = unpack_row, .unpack_row_bf16 = unpack_row_bf16, .small = small, .forward = forward, \
    .backward = backward, .low_rank = &low_rank, .quantize = quantize_token, .int8 = INT8, .vectors = &vectors,     \
    .pointwise = &pointwise, .attention = &attention
