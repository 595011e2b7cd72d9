// The kernels for AVX-512.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prfchw,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prfchw,fma,f16c,prefer-vector-width=512")
#endif

#define SINGD_INSTRUCTIONS avx512
#define SINGD_VECTOR_BYTES 64
#define SINGD_TILE_ROWS 6
#define SINGD_TILE_VECTORS 4
#define SINGD_MOST_TILE_ROWS 12
#include "simd/kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
