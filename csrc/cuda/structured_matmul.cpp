// structured_matmul: the product of a structured factor and a matrix.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "../call_checks.h"
#include "products.h"
#include "runtime.h"

namespace singd::cuda {
namespace {

// As on the CPU, low precision is computed in float32 and rounded once.
at::Tensor structured_matmul(const at::Tensor& factor, int64_t dim, const std::string& structure,
                             const at::Tensor& other, const std::string& side, bool transpose) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "structured_matmul";
  const Matmul checked = checked_matmul(op, factor, dim, structure, other, side);
  const Layout& layout = checked.layout;
  const Side where = checked.side;
  const c10::DeviceGuard device_guard(other.device());
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
