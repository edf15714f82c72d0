/* The kernels for x86-64-v4 with VNNI and AVX512-BF16, which have products of bfloat16 numbers besides. */

#include "native.h"

#if HAVE_BF16_LEVEL
#pragma GCC target("arch=x86-64-v4,avx512vnni,avx512bf16,prefer-vector-width=512")
#include "activations.h"
#include "attend.h"
#include "rows.h"
#include "simd.h"
#include "small.h"
#include "panels.h"
#include "low_rank.h"

const Level qgraft_v4_bf16 = {"x86-64-v4 (AVX-512, VNNI, BF16)", unpack_row, unpack_row_bf16, small, forward, backward,
                              forward_bf16, backward_bf16, round_pairs, &low_rank, quantize_token, qgraft_int8_vnni, &vectors};
#endif
