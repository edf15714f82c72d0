/* The kernels for x86-64-v4: AVX-512 with the F, BW, CD, DQ and VL parts. */

#include <stddef.h>

#include "native.h"

#if HAVE_X86_LEVELS
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#include "rows.h"
#include "attend.h"
#include "simd.h"
#include "small.h"
#include "panels.h"
#include "low_rank.h"

#pragma GCC target("avx512vnni")
#define INT8_PRODUCT qgraft_int8_vnni
#include "int8.h"

const Level qgraft_v4 = {"x86-64-v4 (AVX-512)", unpack_row, unpack_row_bf16, small, forward, backward, NULL, NULL, NULL, &low_rank,
                         quantize_token, qgraft_int8_v3, &vectors};
const Level qgraft_v4_vnni = {"x86-64-v4 (AVX-512, VNNI)", unpack_row, unpack_row_bf16, small, forward, backward, NULL, NULL, NULL, &low_rank,
                         quantize_token, qgraft_int8_vnni, &vectors};
#endif
