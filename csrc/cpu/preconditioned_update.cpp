// preconditioned_update_: the step of a list of layers,
//
//   M <- alpha2 M + C C^T (dl/dW) K K^T + gamma W      W <- W - beta2 M
//
// with W = [weight, bias] as one d_o x d_i matrix that is never put together in memory. A layer
// whose preconditioned gradient is not finite keeps W and M bit for bit.
#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>

#include "../op_checks.h"
#include "../structures/registry.h"
#include "math.h"
#include "store.h"

namespace singd::cpu {
namespace {

constexpr const char* kOp = "preconditioned_update_";

struct Options {
  double lr, momentum, weight_decay;
};

// The columns [begin, begin + width) of the layer's matrix W that one parameter holds: the weight,
// or the bias as the last column.
struct Part {
  at::Tensor parameter, momentum, gradient;  // momentum is undefined if alpha2 = 0
  int64_t begin, width;
};

void check_part(const char* name, const Part& part, int64_t rows) {
  check_dtype(kOp, name, part.parameter);
  check_dtype(kOp, name, part.gradient);
  at::assert_no_internal_overlap(part.parameter);
  TORCH_CHECK_VALUE(part.gradient.sizes() == part.parameter.sizes(), "singd_ext::", kOp, ": ", name,
                    " has shape ", part.parameter.sizes(), " but its gradient has shape ",
                    part.gradient.sizes());
  TORCH_CHECK_VALUE(part.parameter.dim() >= 1 && part.parameter.size(0) == rows, "singd_ext::", kOp,
                    ": ", name, " of shape ", part.parameter.sizes(), " does not have ", rows,
                    " rows");
  check_same_device(kOp, part.parameter, part.gradient);
  if (!part.momentum.defined()) return;
  check_dtype(kOp, name, part.momentum);
  at::assert_no_internal_overlap(part.momentum);
  TORCH_CHECK_VALUE(part.momentum.sizes() == part.parameter.sizes(), "singd_ext::", kOp, ": ", name,
                    " has shape ", part.parameter.sizes(), " but its momentum has shape ",
                    part.momentum.sizes());
}

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

// One factor of a layer and, where the caller keeps it, the dense product F F^T.
struct Factor {
  Layout layout;
  at::Tensor storage, cached_product;
};

// P <- F F^T P on the left or P F F^T on the right. The result is in p; scratch is as large.
template <class T>
void precondition(const Factor& factor, at::ScalarType dtype, Side side, int64_t other, T*& p,
                  T*& scratch) {
  const Layout& layout = factor.layout;
  if (factor.cached_product.defined()) {
    const at::Tensor product = factor.cached_product.to(dtype);
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

struct Layer {
  std::vector<Part> parts;
  Factor K, C;
};

Factor checked_factor(const char* name, const at::Tensor& storage, const at::Tensor& product,
                      int64_t dim, const std::string& structure, const at::Tensor& weight) {
  Factor factor{checked_layout(kOp, structure, dim), storage, {}};
  check_factor(kOp, name, storage, structure, factor.layout);
  check_same_device(kOp, weight, storage);
  if (!product.defined() || product.numel() == 0) return factor;
  check_cached_product(kOp, name, product, factor.layout);
  factor.cached_product = product;
  return factor;
}

Layer checked_layer(std::vector<Part> parts, const at::Tensor& K, const at::Tensor& C,
                    const at::Tensor& P_K, const at::Tensor& P_C, const std::string& structure_K,
                    const std::string& structure_C) {
  const int64_t rows = parts.front().parameter.size(0);
  check_part("weight", parts.front(), rows);
  if (parts.size() > 1) check_part("bias", parts.back(), rows);
  const int64_t columns = parts.back().begin + parts.back().width;
  const at::Tensor& weight = parts.front().parameter;
  Factor k = checked_factor("K", K, P_K, columns, structure_K, weight);
  Factor c = checked_factor("C", C, P_C, rows, structure_C, weight);
  return {std::move(parts), std::move(k), std::move(c)};
}

// False if the layer was left as it was because its preconditioned gradient is not finite.
bool update_layer(const Layer& layer, double unscale, const Options& options,
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
  const size_t layers = weight.size();
  const size_t momenta = momentum != 0 ? layers : 0;
  check_length(kOp, "bias", bias.size(), layers);
  check_length(kOp, "momentum_weight", momentum_weight.size(), momenta);
  check_length(kOp, "momentum_bias", momentum_bias.size(), momenta);
  check_length(kOp, "skipped", skipped.size(), layers);
  check_length(kOp, "grad_weight", grad_weight.size(), layers);
  check_length(kOp, "grad_bias", grad_bias.size(), layers);
  check_length(kOp, "K", K.size(), layers);
  check_length(kOp, "C", C.size(), layers);
  check_length(kOp, "P_K", P_K.size(), P_K.empty() ? 0 : layers);
  check_length(kOp, "P_C", P_C.size(), P_C.empty() ? 0 : layers);
  check_outcomes(kOp, outcomes, layers);
  const Options options{checked_scalar(kOp, "lr", lr), momentum, weight_decay};
  const Scaler scaler = checked_scaler(kOp, grad_scale, found_inf);
  const RoundingKey key = rounding_key(kOp, rounding);

  std::vector<Layer> checked;
  for (size_t i = 0; i < layers; ++i) {
    TORCH_CHECK_VALUE(weight[i].dim() >= 1 && weight[i].numel() > 0, "singd_ext::", kOp,
                      ": weight of shape ", weight[i].sizes(), " is empty");
    const int64_t width = weight[i].numel() / weight[i].size(0);
    std::vector<Part> parts;
    parts.push_back({weight[i], momenta ? momentum_weight[i] : at::Tensor(), grad_weight[i], 0, width});
    if (bias[i].numel() > 0) {  // a layer without bias holds its place with an empty tensor
      parts.push_back(
          {bias[i], momenta ? momentum_bias[i] : at::Tensor(), grad_bias[i], width, 1});
    }
    checked.push_back(checked_layer(std::move(parts), K[i], C[i],
                                    P_K.empty() ? at::Tensor() : P_K[i],
                                    P_C.empty() ? at::Tensor() : P_C[i], structure_K, structure_C));
  }

  outcomes.zero_();
  for (size_t i = 0; i < layers && !scaler.found_inf; ++i) {
    if (!update_layer(checked[i], scaler.unscale, options, key.stream(i))) {
      skipped[i].add_(1);
      outcomes.mutable_data_ptr<int64_t>()[i] = 1;
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(singd_ext, CPU, m) { m.impl("preconditioned_update_", preconditioned_update_); }

}  // namespace singd::cpu
