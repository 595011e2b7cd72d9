// The kernels for AVX2.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define SINGD_INSTRUCTIONS avx2
#define SINGD_VECTOR_BYTES 32
#define SINGD_TILE_ROWS 4
#define SINGD_TILE_VECTORS 3
#define SINGD_MOST_TILE_ROWS 6
#include "simd/kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
