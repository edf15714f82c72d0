/* The kernels for x86-64-v4 with VNNI and AVX512-BF16, which have products of bfloat16 numbers besides. */

#include "level.h"

#if HAVE_X86_LEVELS
#pragma GCC target("arch=x86-64-v4,avx512vnni,avx512bf16,prefer-vector-width=512")
#include "vector_level.h"

const Level qgraft_avx512_bf16 = {
    VECTOR_LEVEL("avx512-bf16", qgraft_gemv_vnni, qgraft_gemm_int8_vnni),
    .gemm_bf16 = gemm_bf16, .gemm_grad_input_bf16 = gemm_grad_input_bf16, .round_pairs = round_pairs,
};
#endif
