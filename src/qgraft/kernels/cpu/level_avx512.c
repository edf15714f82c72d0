/* The kernels for x86-64-v4: AVX-512 with the F, BW, CD, DQ and VL parts. */

#include "level.h"

#if HAVE_X86_LEVELS
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#include "vector_level.h"

#pragma GCC target("avx512vnni")
#define GEMM_INT8 qgraft_gemm_int8_vnni
#include "gemm_int8.h"
#include "gemv_digits.h"

const Level qgraft_avx512 = {VECTOR_LEVEL("avx512", gemv, qgraft_gemm_int8_avx2)};
const Level qgraft_avx512_vnni = {VECTOR_LEVEL("avx512-vnni", qgraft_gemv_vnni, qgraft_gemm_int8_vnni)};
#endif
