// accumulate_statistic_: adds the rows of one micro-batch to the statistic of one factor.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../call_checks.h"
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
                           const std::string& shared, bool overwrite) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "accumulate_statistic_";
  const Layout layout = checked_statistic(op, statistic, rows, factor, dim, structure, ones_column);
  const auto dtype = statistic.scalar_type();
  const Shared reduction = checked_shared(op, shared);
  const c10::DeviceGuard device_guard(statistic.device());
  if (overwrite) statistic.zero_();
  if (rows.size(0) * rows.size(1) == 0) return;
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
