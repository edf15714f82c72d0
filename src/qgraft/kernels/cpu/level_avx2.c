/* The kernels for x86-64-v3: AVX2, FMA and F16C. */

#include "level.h"

#if HAVE_X86_LEVELS
#pragma GCC target("arch=x86-64-v3")
#include "vector_level.h"
#define GEMM_INT8 qgraft_gemm_int8_avx2
#include "gemm_int8.h"
#include "gemm_int8_panels.h"

const Level qgraft_avx2 = {
    VECTOR_LEVEL("avx2", gemv, qgraft_gemm_int8_avx2),
    .gemm_int8_panels = gemm_int8_panels, .gemm_grad_input_int8 = gemm_grad_input_int8,
};
#endif
