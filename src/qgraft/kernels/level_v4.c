/* The kernels for x86-64-v4: AVX-512 with the F, BW, CD, DQ and VL parts. */

#include "native.h"

#if HAVE_X86_LEVELS
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#include "rows.h"
#include "simd.h"
#include "small.h"

const Level qgraft_v4 = {"x86-64-v4 (AVX-512)", unpack_row, to_bf16, small};
#endif
