// Statistics of bfloat16 rows for AVX-512 with bfloat16 products; everything else of such a
// processor is in simd_avx512.cpp.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,prefer-vector-width=512")
#endif

#define SINGD_BFLOAT16_PRODUCTS 1
#define SINGD_VECTOR_BYTES 64
#define SINGD_TILE_ROWS 6
#define SINGD_TILE_VECTORS 4
#define SINGD_MOST_TILE_ROWS 12

namespace singd::cpu::avx512_bfloat16 {
namespace {

// clang-format off: in the order of what uses what
#include "simd/vector.h"
#include "simd/product.h"
#include "simd/rows.h"
#include "simd/gram.h"
// clang-format on

}  // namespace

const GramKernels<float> kernels = gram_kernels<float, Pair>();

}  // namespace singd::cpu::avx512_bfloat16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
