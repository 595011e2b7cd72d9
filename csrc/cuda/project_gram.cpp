// project_gram: Pi(X^T X) without forming it. It is the statistic for K = I, weighted.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../call_checks.h"
#include "../structures/spec.h"
#include "row_kernels.h"
#include "runtime.h"
#include "statistic.h"

namespace singd::cuda {
namespace {

at::Tensor project_gram(const at::Tensor& rows, const std::string& structure) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "project_gram";
  const Layout layout = checked_rows(op, rows, structure);
  const auto dtype = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const c10::DeviceGuard device_guard(rows.device());
  const at::Tensor out = at::zeros({storage_size(layout)}, rows.options().dtype(dtype));
  if (rows.size(0) == 0) return out;
  run(op, structure, rows.sizes(), [&] {
    const RowMatrix x = row_matrix(rows.unsqueeze(0), false, Shared::kExpand, dtype);
    accumulate_statistic(layout, out, x, nullptr);
    weigh(layout, out.mutable_data_ptr(), dtype_of(dtype), x.stream);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(SINGD_LIBRARY, SINGD_CUDA_KEY, m) { m.impl("project_gram", project_gram); }

}  // namespace singd::cuda
