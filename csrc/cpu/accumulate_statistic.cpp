// accumulate_statistic_: adds the rows of one micro-batch to the statistic of one factor.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../op_checks.h"
#include "../structures/registry.h"
#include "math.h"
#include "rows.h"

namespace singd::cpu {
namespace {

void accumulate_statistic_(at::Tensor& statistic, const at::Tensor& rows, const at::Tensor& factor,
                           int64_t dim, const std::string& structure, bool ones_column,
                           const std::string& shared) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "accumulate_statistic_";
  const Layout layout = checked_layout(op, structure, dim);
  check_factor(op, "statistic", statistic, structure, layout);
  check_factor(op, "factor", factor, structure, layout);
  check_dtype(op, "rows", rows);
  check_ndim(op, "rows", rows, 3);
  check_same_device(op, statistic, rows);
  check_same_device(op, statistic, factor);
  const auto dtype = statistic.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "singd_ext::", op,
                   ": statistic has dtype ", dtype, "; sums need float32 or float64");
  const Rows source(rows, ones_column, checked_shared(op, shared));
  TORCH_CHECK_VALUE(source.dim() == dim, "singd_ext::", op, ": rows of shape ", rows.sizes(),
                    ones_column ? " with a column of ones" : "", " do not fit a factor '",
                    structure, "' of dimension ", dim);
  const at::Tensor k = factor.to(dtype);
  dispatch_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    visit(layout, [&](const auto& family) {
      source.for_each_chunk<T>(layout, [&](const T* chunk, int64_t m) {
        family.template accumulate<AtenMath, T>(k.const_data_ptr<T>(), chunk, m,
                                                statistic.mutable_data_ptr<T>());
      });
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(singd_ext, CPU, m) { m.impl("accumulate_statistic_", accumulate_statistic_); }

}  // namespace singd::cpu
