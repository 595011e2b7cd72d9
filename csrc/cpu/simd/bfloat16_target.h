// The instruction set of simd_bfloat16.cpp and simd_amx.cpp: what follows is compiled for it.
// clang's push is popped at their end.
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prfchw,avx512bf16,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,prfchw,avx512bf16,fma,f16c,prefer-vector-width=512")
#endif

#define SINGD_BFLOAT16_PRODUCTS 1
#define SINGD_VECTOR_BYTES 64
#define SINGD_TILE_ROWS 6
#define SINGD_TILE_VECTORS 4
#define SINGD_MOST_TILE_ROWS 12
