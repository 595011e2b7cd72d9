// project, extract, to_dense: between dense matrices and structured storage.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "../call_checks.h"
#include "../structures/spec.h"
#include "elementwise.h"
#include "runtime.h"

namespace singd::cuda {
namespace {

using FromDense = void (*)(const Layout&, Dtype, const DenseMatrix&, void*, Stream);

// The storage that `kernel` makes of a square matrix, in the matrix's dtype.
at::Tensor from_dense(const char* op, const char* name, const at::Tensor& matrix,
                      const std::string& structure, FromDense kernel) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Layout layout = checked_square(op, name, matrix, structure);
  const c10::DeviceGuard device_guard(matrix.device());
  at::Tensor out = at::empty({storage_size(layout)}, matrix.options());
  const DenseMatrix source{matrix.const_data_ptr(), matrix.stride(0), matrix.stride(1)};
  run(op, structure, matrix.sizes(), [&] {
    kernel(layout, dtype_of(matrix), source, out.mutable_data_ptr(), current_stream(matrix));
  });
  return out;
}

at::Tensor project_symmetric(const at::Tensor& symmetric, const std::string& structure) {
  return from_dense("project", "symmetric", symmetric, structure, project);
}

at::Tensor extract_entries(const at::Tensor& dense, const std::string& structure) {
  return from_dense("extract", "dense", dense, structure, extract);
}

at::Tensor dense_matrix(const at::Tensor& factor, int64_t dim, const std::string& structure) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Layout layout = checked_layout("to_dense", structure, dim);
  check_factor("to_dense", "factor", factor, structure, layout);
  const c10::DeviceGuard device_guard(factor.device());
  at::Tensor out = at::empty({dim, dim}, factor.options());
  run("to_dense", structure, out.sizes(), [&] {
    to_dense(layout, dtype_of(factor), factor.const_data_ptr(), out.mutable_data_ptr(),
             current_stream(factor));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(SINGD_LIBRARY, SINGD_CUDA_KEY, m) {
  m.impl("project", project_symmetric);
  m.impl("extract", extract_entries);
  m.impl("to_dense", dense_matrix);
}

}  // namespace singd::cuda
