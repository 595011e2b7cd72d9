// structured_matmul: the product of a structured factor and a matrix.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "products.h"
#include "runtime.h"

namespace singd::cuda {
namespace {

// As on the CPU, low precision is computed in float32 and rounded once.
at::Tensor structured_matmul(const at::Tensor& factor, int64_t dim, const std::string& structure,
                             const at::Tensor& other, const std::string& side, bool transpose) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "structured_matmul";
  const Layout layout = checked_layout(op, structure, dim);
  check_factor(op, "factor", factor, structure, layout);
  check_dtype(op, "other", other);
  check_ndim(op, "other", other, 2);
  check_same_device(op, factor, other);
  const c10::DeviceGuard device_guard(other.device());
  const Side where = checked_side(op, side);
  const int64_t inner = where == Side::kLeft ? other.size(0) : other.size(1);
  TORCH_CHECK_VALUE(inner == dim, "singd_ext::", op, ": a factor of dimension ", dim, " ('",
                    structure, "') on the ", side, " does not fit a matrix of shape ",
                    other.sizes());
  const auto result = c10::promoteTypes(factor.scalar_type(), other.scalar_type());
  const auto dtype = result == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor product;
  run(op, structure, other.sizes(),
      [&] { product = multiply(layout, factor.to(dtype), where, transpose, other.to(dtype)); });
  return product.to(result);
}

}  // namespace

TORCH_LIBRARY_IMPL(SINGD_LIBRARY, SINGD_CUDA_KEY, m) {
  m.impl("structured_matmul", structured_matmul);
}

}  // namespace singd::cuda
