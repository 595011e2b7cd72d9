// All kernels of one instruction set; simd_*.cpp say which.
namespace singd::cpu::SINGD_INSTRUCTIONS {
namespace {

#include "vector.h"
// vector.h comes first.
#include "product.h"
// product.h comes before what multiplies.
#include "prepare.h"
#include "step.h"
// step.h comes before what stores as it does.
#include "factors.h"
#include "candidates.h"
// candidates.h comes before what takes its norms.
#include "factor_blocks.h"
// And all of them before the table.
#include "factor_kernels.h"

#define SINGD_STRING(name) SINGD_STRING_(name)
#define SINGD_STRING_(name) #name

}  // namespace

const Kernels kernels{SINGD_STRING(SINGD_INSTRUCTIONS), step_kernels<float>(),
                      step_kernels<double>(), factor_kernels<float>(), factor_kernels<double>()};

}  // namespace singd::cpu::SINGD_INSTRUCTIONS
