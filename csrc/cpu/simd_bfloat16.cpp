// Statistics of bfloat16 rows for AVX-512 with bfloat16 products; everything else of such a
// processor is in simd_avx512.cpp.
#include "kernels.h"

#if defined(__x86_64__)
#include "simd/bfloat16_target.h"

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
