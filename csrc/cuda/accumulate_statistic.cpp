// accumulate_statistic_: adds the rows of one micro-batch to the statistic of one factor.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "runtime.h"
#include "statistic.h"

namespace singd::cuda {

void accumulate_statistic(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x,
                          const at::Tensor* factor) {
  switch (layout.family) {
    case Family::kDiagonal:
      return accumulate_diagonal(statistic, x);
    case Family::kBlockDiagonal:
      return accumulate_blocks(layout, statistic, x);
    case Family::kBordered:
      return accumulate_bordered(layout, statistic, x, factor);
    case Family::kToeplitz:
      return accumulate_toeplitz(layout, statistic, x, factor);
    case Family::kDense:
      return accumulate_dense(statistic, x, factor);
  }
}

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
  const Shared reduction = checked_shared(op, shared);
  TORCH_CHECK_VALUE(rows.size(2) + (ones_column ? 1 : 0) == dim, "singd_ext::", op,
                    ": rows of shape ", rows.sizes(), ones_column ? " with a column of ones" : "",
                    " do not fit a factor '", structure, "' of dimension ", dim);
  if (rows.size(0) * rows.size(1) == 0) return;
  const c10::DeviceGuard device_guard(statistic.device());
  run(op, structure, rows.sizes(), [&] {
    const RowMatrix x = row_matrix(rows, ones_column, reduction, dtype);
    const at::Tensor k = factor.to(dtype);
    accumulate_statistic(layout, statistic, x, &k);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(SINGD_LIBRARY, SINGD_CUDA_KEY, m) {
  m.impl("accumulate_statistic_", accumulate_statistic_);
}

}  // namespace singd::cuda
