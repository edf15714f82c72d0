/* The kernels for x86-64-v4: AVX-512 with the F, BW, CD, DQ and VL parts. */

#include "native.h"

#if HAVE_X86_LEVELS
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#include "level.h"

#pragma GCC target("avx512vnni")
#define INT8_PRODUCT qgraft_int8_vnni
#include "int8.h"

const Level qgraft_v4 = {LEVEL("avx512", qgraft_int8_v3)};
const Level qgraft_v4_vnni = {LEVEL("avx512-vnni", qgraft_int8_vnni)};
#endif
