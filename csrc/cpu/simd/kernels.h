// All kernels of one instruction set; simd_*.cpp say which.

namespace singd::cpu::SINGD_INSTRUCTIONS {
namespace {

// clang-format off: in the order of what uses what
#include "vector.h"
#include "transpose.h"
#include "ahead.h"
#include "product.h"
#include "prepare.h"
#include "rows.h"
#include "one_border.h"
#include "gram.h"
#include "statistics.h"
#include "taps.h"
#include "write.h"
#include "side_product.h"
#include "read.h"
#include "tile_blocks.h"
#include "step.h"
#include "factors.h"
#include "momentum.h"
#include "candidates.h"
#include "factor_blocks.h"
#include "factor_kernels.h"
// clang-format on

#define SINGD_STRING(name) SINGD_STRING_(name)
#define SINGD_STRING_(name) #name

}  // namespace

const Kernels kernels{SINGD_STRING(SINGD_INSTRUCTIONS), statistic_kernels<float>(),
                      statistic_kernels<double>(),      step_kernels<float>(),
                      step_kernels<double>(),           factor_kernels<float>(),
                      factor_kernels<double>(),         mirror};

}  // namespace singd::cpu::SINGD_INSTRUCTIONS
