/* The kernels for x86-64-v3: AVX2, FMA and F16C. */

#include <stddef.h>

#include "native.h"

#if HAVE_X86_LEVELS
#pragma GCC target("arch=x86-64-v3")
#include "rows.h"
#include "attend.h"
#include "simd.h"
#include "small.h"
#include "panels.h"
#include "low_rank.h"
#define INT8_PRODUCT qgraft_int8_v3
#include "int8.h"

const Level qgraft_v3 = {"x86-64-v3 (AVX2)", unpack_row, unpack_row_bf16, small, forward, backward, NULL, NULL, NULL, &low_rank,
                         quantize_token, qgraft_int8_v3, &vectors};
#endif
