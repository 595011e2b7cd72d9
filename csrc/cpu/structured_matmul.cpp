// structured_matmul, structured_product, factor_gram: products with a structured factor; K K^T of a
// dense one, which the optimizer keeps from step to step.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../call_checks.h"
#include "../structures/registry.h"
#include "math.h"

namespace singd::cpu {
namespace {

at::Tensor structured_matmul(const at::Tensor& factor, int64_t dim, const std::string& structure,
                             const at::Tensor& other, const std::string& side, bool transpose) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "structured_matmul";
  const Matmul checked = checked_matmul(op, factor, dim, structure, other, side);
  const Layout& layout = checked.layout;
  const Side where = checked.side;
  const auto result = c10::promoteTypes(factor.scalar_type(), other.scalar_type());
  const auto dtype = compute_type(result);
  const at::Tensor k = factor.to(dtype), x = other.to(dtype).contiguous();
  at::Tensor y = at::empty(x.sizes(), x.options());
  dispatch_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    visit(layout, [&](const auto& family) {
      family.template multiply<AtenMath, T>(k.const_data_ptr<T>(), where, transpose,
                                            x.const_data_ptr<T>(), y.mutable_data_ptr<T>(),
                                            where == Side::kLeft ? x.size(1) : x.size(0));
    });
  });
  return y.to(result);
}

at::Tensor structured_product(const at::Tensor& a, const at::Tensor& b, int64_t dim,
                              const std::string& structure) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "structured_product";
  const Layout layout = checked_product(op, a, b, dim, structure);
  const auto result = c10::promoteTypes(a.scalar_type(), b.scalar_type());
  const auto dtype = compute_type(result);
  const at::Tensor left = a.to(dtype), right = b.to(dtype);
  at::Tensor out = at::empty_like(left);
  dispatch_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    visit(layout, [&](const auto& family) {
      family.template product<AtenMath, T>(left.const_data_ptr<T>(), right.const_data_ptr<T>(),
                                           out.mutable_data_ptr<T>());
    });
  });
  return out.to(result);
}

at::Tensor factor_gram(const at::Tensor& factor, int64_t dim, const std::string& structure) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Layout layout = checked_layout("factor_gram", structure, dim);
  check_factor("factor_gram", "factor", factor, structure, layout);
  const auto dtype = compute_type(factor.scalar_type());
  const at::Tensor k = factor.to(dtype);
  at::Tensor out = at::empty_like(k);
  dispatch_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    visit(layout, [&](const auto& family) {
      family.template gram<AtenMath, T>(k.const_data_ptr<T>(), out.mutable_data_ptr<T>());
    });
  });
  return out.to(factor.scalar_type());
}

}  // namespace

at::Tensor times_its_transpose(const at::Tensor& square) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t d = square.size(0);
  const at::Tensor k = square.contiguous(), out = at::empty_like(k);
  AT_DISPATCH_FLOATING_TYPES(k.scalar_type(), "K K^T", [&] {
    const auto rows = MatrixView<const scalar_t>{k.const_data_ptr<scalar_t>(), d}.transpose();
    const MatrixView<scalar_t> product{out.mutable_data_ptr<scalar_t>(), d};
    AtenMath::multiply_symmetric(d, d, rows, rows, product, false);
  });
  return out;
}

TORCH_LIBRARY_IMPL(singd_ext, CPU, m) {
  m.impl("structured_matmul", structured_matmul);
  m.impl("structured_product", structured_product);
  m.impl("factor_gram", factor_gram);
}

}  // namespace singd::cpu
