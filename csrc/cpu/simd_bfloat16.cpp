// For AVX-512 with bfloat16 instructions: statistics of bfloat16 rows, and steps, which may store
// bfloat16 numbers. Everything else of such a processor is in simd_avx512.cpp.
#include "kernels.h"

#if defined(__x86_64__)
#include "simd/bfloat16_target.h"

#define SINGD_PAIRS 1

namespace singd::cpu::avx512_bfloat16 {
namespace {

// clang-format off: in the order of what uses what
#include "simd/vector.h"
#include "simd/bfloat16_vectors.h"
#include "simd/transpose.h"
#include "simd/ahead.h"
#include "simd/product.h"
#include "simd/pairs.h"
#include "simd/prepare.h"
#include "simd/rows.h"
#include "simd/one_border.h"
#include "simd/gram.h"
#include "simd/taps.h"
#include "simd/write.h"
#include "simd/side_product.h"
#include "simd/read.h"
#include "simd/tile_blocks.h"
#include "simd/step.h"
// clang-format on

}  // namespace
#undef SINGD_PAIRS

void rows(const RowsView& view, int64_t dim, int64_t begin, int64_t end, float* sums,
          float* scratch) {
  gram_rows(view, dim, begin, end, sums, scratch);
}

const GramKernels<float> gram_kernels{block_statistic<float, Pair>, border_statistic<float, Pair>};
const StepKernels<float> step_kernels{
    prepare_product<float>, load_unscaled<float>, largest_gradient<float>, thin_products<float>,
    add_products<float>,    finish_border<float>, step_panel<float>};

}  // namespace singd::cpu::avx512_bfloat16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
