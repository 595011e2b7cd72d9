// All kernels of one instruction set; simd_*.cpp say which.

// SINGD_COUNT(what, n): n elements or multiply_adds are about to be worked on. Only the test of the
// operations' growth counts them.
#ifndef SINGD_COUNT
#define SINGD_COUNT(what, n)
#endif

namespace singd::cpu::SINGD_INSTRUCTIONS {
namespace {

#include "vector.h"
// vector.h comes first.
#include "product.h"
// product.h comes before what multiplies.
#include "prepare.h"
#include "statistics.h"
#include "step.h"

#define SINGD_STRING(name) SINGD_STRING_(name)
#define SINGD_STRING_(name) #name

}  // namespace

const Kernels kernels{SINGD_STRING(SINGD_INSTRUCTIONS), statistic_kernels<float>(),
                      statistic_kernels<double>(), step_kernels<float>(), step_kernels<double>()};

}  // namespace singd::cpu::SINGD_INSTRUCTIONS
