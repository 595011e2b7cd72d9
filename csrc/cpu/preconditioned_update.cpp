// preconditioned_update_: the step of a list of layers,
//
//   M <- alpha2 M + C C^T (dl/dW) K K^T + gamma W      W <- W - beta2 M
//
// with W = [weight, bias] as one d_o x d_i matrix that is never put together in memory. A layer
// whose preconditioned gradient is not finite keeps W and M bit for bit.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>

#include "../call_checks.h"
#include "../structures/registry.h"
#include "math.h"
#include "store.h"

namespace singd::cpu {
namespace {

constexpr const char* kOp = "preconditioned_update_";

struct Options {
  double lr, momentum, weight_decay;
};

// The gradient of one part into its columns of the rows x columns matrix p, times `scale`.
template <class T>
void load_gradient(const Part& part, int64_t rows, int64_t columns, double scale, T* p) {
  const at::Tensor gradient = part.gradient.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gradient.scalar_type(), "load", [&] {
    const scalar_t* from = gradient.const_data_ptr<scalar_t>();
    AtenMath::parallel_for(rows, part.width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* to = p + i * columns + part.begin;
        for (int64_t j = 0; j < part.width; ++j) {
          to[j] = static_cast<T>(from[i * part.width + j]) * static_cast<T>(scale);
        }
      }
    });
  });
}

template <class T>
bool all_finite(const T* p, int64_t size) {
  std::atomic<bool> finite{true};
  AtenMath::parallel_for(size, 1, [&](int64_t begin, int64_t end) {
    bool ok = true;
    for (int64_t i = begin; i < end; ++i) ok &= std::isfinite(p[i]);
    if (!ok) finite = false;
  });
  return finite;
}

// M <- alpha2 M + P + gamma W and W <- W - beta2 M for one part; M stays in registers for the
// second. Strided parameters are updated in a contiguous copy.
template <class T>
void write_part(const Part& part, int64_t rows, int64_t columns, const T* p, const Options& o,
                const RoundingKey& key) {
  at::Tensor parameter = part.parameter.contiguous();
  at::Tensor momentum = part.momentum.defined() ? part.momentum.contiguous() : at::Tensor();
  const T lr = static_cast<T>(o.lr), alpha = static_cast<T>(o.momentum);
  const T decay = static_cast<T>(o.weight_decay);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, parameter.scalar_type(), "write", [&] {
    using Weight = scalar_t;
    Weight* w = parameter.mutable_data_ptr<Weight>();
    const auto momentum_type = momentum.defined() ? momentum.scalar_type() : at::kFloat;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, momentum_type, "write", [&] {
      scalar_t* m = momentum.defined() ? momentum.mutable_data_ptr<scalar_t>() : nullptr;
      AtenMath::parallel_for(rows, part.width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const T* gradient = p + i * columns + part.begin;
          for (int64_t j = 0; j < part.width; ++j) {
            const int64_t at = i * part.width + j;
            const T weight = static_cast<T>(w[at]);
            T step = gradient[j] + decay * weight;
            if (m != nullptr) {
              step += alpha * static_cast<T>(m[at]);
              m[at] = rounded<scalar_t>(step, key.stream(0), at);
            }
            w[at] = rounded<Weight>(weight - lr * step, key.stream(1), at);
          }
        }
      });
    });
  });
  if (!parameter.is_same(part.parameter)) part.parameter.copy_(parameter);
  if (momentum.defined() && !momentum.is_same(part.momentum)) part.momentum.copy_(momentum);
}

// P <- F F^T P on the left or P F F^T on the right. The result is in p; scratch is as large.
template <class T>
void precondition(const LayerFactor& factor, at::ScalarType dtype, Side side, int64_t other, T*& p,
                  T*& scratch) {
  const Layout& layout = factor.layout;
  if (factor.product.defined()) {
    const at::Tensor product = factor.product.to(dtype);
    const MatrixView<const T> square{product.const_data_ptr<T>(), layout.dim};
    const int64_t d = layout.dim;
    if (side == Side::kLeft) {
      AtenMath::multiply(d, other, d, square, MatrixView<const T>{p, other},
                         MatrixView<T>{scratch, other});
    } else {
      AtenMath::multiply(other, d, d, MatrixView<const T>{p, d}, square, MatrixView<T>{scratch, d});
    }
    return std::swap(p, scratch);
  }
  const at::Tensor storage = factor.storage.to(dtype);
  const T* f = storage.const_data_ptr<T>();
  const bool first_transposed = side == Side::kLeft;  // C (C^T P), (P K) K^T
  visit(layout, [&](const auto& family) {
    family.template multiply<AtenMath, T>(f, side, first_transposed, p, scratch, other);
    family.template multiply<AtenMath, T>(f, side, !first_transposed, scratch, p, other);
  });
}

// False if the layer was left as it was because its preconditioned gradient is not finite.
bool update_layer(const LayerStep& layer, double unscale, const Options& options,
                  const RoundingKey& key) {
  const int64_t rows = layer.C.layout.dim, columns = layer.K.layout.dim;
  auto dtype = c10::promoteTypes(layer.K.storage.scalar_type(), layer.C.storage.scalar_type());
  for (const Part& part : layer.parts) {
    dtype = c10::promoteTypes(dtype, part.parameter.scalar_type());
  }
  dtype = compute_type(dtype);
  return dispatch_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    at::Tensor gradient = at::empty({rows, columns}, layer.K.storage.options().dtype(dtype));
    at::Tensor scratch = at::empty_like(gradient);
    T *p = gradient.mutable_data_ptr<T>(), *tmp = scratch.mutable_data_ptr<T>();
    for (const Part& part : layer.parts) load_gradient(part, rows, columns, unscale, p);
    precondition(layer.C, dtype, Side::kLeft, columns, p, tmp);
    precondition(layer.K, dtype, Side::kRight, rows, p, tmp);
    if (!all_finite(p, rows * columns)) return false;
    for (size_t i = 0; i < layer.parts.size(); ++i) {
      write_part(layer.parts[i], rows, columns, p, options, key.stream(i));
    }
    return true;
  });
}

void preconditioned_update_(at::TensorList weight, at::TensorList bias,
                            at::TensorList momentum_weight, at::TensorList momentum_bias,
                            at::TensorList skipped, at::TensorList grad_weight,
                            at::TensorList grad_bias, at::TensorList K, at::TensorList C,
                            at::TensorList P_K, at::TensorList P_C, const std::string& structure_K,
                            const std::string& structure_C, const at::Tensor& lr, double momentum,
                            double weight_decay, at::Tensor& outcomes, at::Tensor& /*workspace*/,
                            const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf,
                            std::optional<at::IntArrayRef> rounding) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const StepLists lists{
      weight, bias, momentum_weight, momentum_bias, skipped, grad_weight, grad_bias, K, C,
      P_K,    P_C,  structure_K,     structure_C};
  const std::vector<LayerStep> layers = checked_steps(kOp, lists, momentum != 0, outcomes.device());
  check_outcomes(kOp, outcomes, layers.size());
  const Options options{checked_scalar(kOp, "lr", lr), momentum, weight_decay};
  const Scaler scaler = checked_scaler(kOp, grad_scale, found_inf);
  const RoundingKey key = checked_rounding_key(kOp, rounding);

  outcomes.zero_();
  for (size_t i = 0; i < layers.size() && !scaler.found_inf; ++i) {
    if (!update_layer(layers[i], scaler.unscale, options, key.stream(i))) {
      skipped[i].add_(1);
      outcomes.mutable_data_ptr<int64_t>()[i] = 1;
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(singd_ext, CPU, m) { m.impl("preconditioned_update_", preconditioned_update_); }

}  // namespace singd::cpu
