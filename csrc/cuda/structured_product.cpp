// structured_product and factor_gram: products of factors that stay in their structure.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include "../call_checks.h"
#include "pattern_product.h"
#include "runtime.h"
#include "wide_blocks.h"

namespace singd::cuda {
namespace {

at::ScalarType compute_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// Dense storage of a triangle holds zeros in the other one. Products keep them, unless an infinity
// or a NaN meets one.
void clear_other_triangle(const Layout& layout, at::Tensor& storage) {
  if (layout.family != Family::kDense || layout.triangle == Triangle::kFull) return;
  at::Tensor matrix = storage.view({layout.dim, layout.dim});
  layout.triangle == Triangle::kLower ? matrix.tril_() : matrix.triu_();
}

at::Tensor structured_product(const at::Tensor& a, const at::Tensor& b, int64_t dim,
                              const std::string& structure) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "structured_product";
  const Layout layout = checked_product(op, a, b, dim, structure);
  const c10::DeviceGuard device_guard(a.device());
  const auto result = c10::promoteTypes(a.scalar_type(), b.scalar_type());
  const auto dtype = compute_type(result);
  const at::Tensor left = a.to(dtype), right = b.to(dtype);
  at::Tensor out = at::empty_like(left);
  if (is_wide(layout)) {
    wide_product(layout, left, false, right, out);
    clear_other_triangle(layout, out);
  } else {
    run(op, structure, a.sizes(), [&] {
      pattern_product(layout, out.numel(), dtype == at::kFloat, left.const_data_ptr(),
                      right.const_data_ptr(), out.mutable_data_ptr(), current_stream(out));
    });
  }
  return out.to(result);
}

at::Tensor factor_gram(const at::Tensor& factor, int64_t dim, const std::string& structure) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "factor_gram";
  const Layout layout = checked_layout(op, structure, dim);
  check_factor(op, "factor", factor, structure, layout);
  const c10::DeviceGuard device_guard(factor.device());
  const auto dtype = compute_type(factor.scalar_type());
  const at::Tensor k = factor.to(dtype);
  at::Tensor out = at::empty_like(k);
  if (is_wide(layout)) {
    wide_product(layout, k, true, k, out);
    if (layout.triangle != Triangle::kFull) {  // weights 2 beside the diagonal
      at::Tensor matrix = out.view({dim, dim});
      at::Tensor diagonal = matrix.diagonal();
      diagonal.mul_(0.5);
      matrix.mul_(2);
      clear_other_triangle(layout, out);
    }
  } else {
    run(op, structure, factor.sizes(), [&] {
      pattern_gram(layout, out.numel(), dtype == at::kFloat, k.const_data_ptr(),
                   out.mutable_data_ptr(), current_stream(out));
    });
  }
  return out.to(factor.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(SINGD_LIBRARY, SINGD_CUDA_KEY, m) {
  m.impl("structured_product", structured_product);
  m.impl("factor_gram", factor_gram);
}

}  // namespace singd::cuda
