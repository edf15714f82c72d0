/* The kernels for x86-64-v4 with VNNI and AVX512-BF16, which have products of bfloat16 numbers besides. */

#include "native.h"

#if HAVE_X86_LEVELS
#pragma GCC target("arch=x86-64-v4,avx512vnni,avx512bf16,prefer-vector-width=512")
#include "level.h"

const Level qgraft_v4_bf16 = {
    LEVEL("avx512-bf16", qgraft_int8_vnni),
    .forward_bf16 = forward_bf16, .backward_bf16 = backward_bf16, .round_pairs = round_pairs,
};
#endif
