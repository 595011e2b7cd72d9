// at::mm multiplies float32 matrices by MKL, which uses no AVX-512 on other processors than Intel's
// and has half of an AMD EPYC's rate. oneDNN, which torch brings too, uses it everywhere; its
// product is within torch's reach as the operator that torch.compile makes linear layers of.
#include "aten_product.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mm.h>

#include <optional>
#include <string>

#include "kernels.h"

namespace singd::cpu {
namespace {

// Multiply-adds below which a call of it costs more than its product saves.
constexpr int64_t kLeastWork = int64_t{1} << 21;

const std::optional<c10::OperatorHandle>& linear() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return handle;
}

// As oneDNN reads it: any other matrix on the right would go through its code for all cases, which
// is very slow.
at::Tensor dense(const at::Tensor& matrix) {
  return matrix.is_non_overlapping_and_dense() ? matrix : matrix.contiguous();
}

at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& b) {
  torch::jit::Stack stack{a,
                          dense(b).t(),
                          c10::IValue(),
                          std::string("none"),
                          c10::List<std::optional<at::Scalar>>(),
                          std::string("")};
  linear()->callBoxed(stack);
  return stack[0].toTensor();
}

}  // namespace

bool multiplies_in_onednn(at::ScalarType dtype, int64_t multiply_adds) {
  static const bool pays = onednn_is_faster() && linear().has_value();
  return pays && dtype == at::kFloat && multiply_adds >= kLeastWork &&
         at::globalContext().userEnabledMkldnn();
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  const int64_t work = a.size(0) * a.size(1) * b.size(1);
  return multiplies_in_onednn(a.scalar_type(), work) ? onednn_product(a, b) : at::mm(a, b);
}

void product_out(const at::Tensor& a, const at::Tensor& b, at::Tensor& c) {
  const int64_t work = a.size(0) * a.size(1) * b.size(1);
  if (!multiplies_in_onednn(a.scalar_type(), work)) {
    at::mm_out(c, a, b);
  } else {
    c.copy_(onednn_product(a, b));
  }
}

}  // namespace singd::cpu
