/* The kernels for x86-64-v3: AVX2, FMA and F16C. */

#include "native.h"

#if HAVE_X86_LEVELS
#pragma GCC target("arch=x86-64-v3")
#include "level.h"
#define INT8_PRODUCT qgraft_int8_v3
#include "int8.h"

const Level qgraft_v3 = {LEVEL("avx2", qgraft_int8_v3)};
#endif
