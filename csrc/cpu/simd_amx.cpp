// Products on AMX tiles, for processors that have them beside AVX-512 with bfloat16 products:
// statistics of bfloat16 rows, and steps of layers that are stored in bfloat16.
#include "kernels.h"

#if defined(__x86_64__)
#include "simd/bfloat16_target.h"

#define SINGD_TILES 1

namespace singd::cpu::amx {
namespace {

// clang-format off: in the order of what uses what
#include "simd/vector.h"
#include "simd/bfloat16_vectors.h"
#include "simd/transpose.h"
#include "simd/ahead.h"
#include "simd/product.h"
#include "simd/tiles.h"
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

void blocks(const RowsView& rows, const Layout& layout, const Panel& part, float* sums,
            float* scratch) {
  with_tiles([&] {
    block_statistic<float, Pair>(rows, layout, part, sums, scratch);
    return true;
  });
}

void border(const RowsView& rows, const Layout& layout, const float* e, const Panel& part,
            float* sums, float* scratch) {
  with_tiles([&] {
    border_statistic<float, Pair>(rows, layout, e, part, sums, scratch);
    return true;
  });
}

double thin(const StepLayer<float>& layer, const Panel& panel, float* products, float* scratch) {
  return with_tiles([&] { return thin_products(layer, panel, products, scratch); });
}

bool step(const StepLayer<float>& layer, const Panel& panel, bool check_only, float* scratch) {
  return with_tiles([&] { return step_panel(layer, panel, check_only, scratch); });
}

}  // namespace

void rows(const RowsView& view, int64_t dim, int64_t begin, int64_t end, float* sums,
          float* scratch) {
  with_tiles([&] {
    gram_rows(view, dim, begin, end, sums, scratch);
    return true;
  });
}

const GramKernels<float> gram_kernels{blocks, border};
const StepKernels<float> step_kernels{prepare_product<float>,
                                      load_unscaled<float>,
                                      largest_gradient<float>,
                                      thin,
                                      add_products<float>,
                                      finish_border<float>,
                                      step};

}  // namespace singd::cpu::amx

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
