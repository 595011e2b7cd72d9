// preconditioned_update_ (see csrc/cpu/preconditioned_update.cpp for what it computes). Layers
// whose factors are both diagonal, or block-diagonal or bordered with blocks and borders of at most
// 64, are updated by a few launches for all of them. For others the preconditioned gradient is
// computed by ATen and handed to the same kernels as a gradient with the identity on both sides.
#include "preconditioned_update.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "../call_checks.h"
#include "products.h"
#include "runtime.h"
#include "step_batch.h"

namespace singd::cuda {
namespace {

constexpr const char* kOp = "preconditioned_update_";
// Preconditioned gradients that wait in memory for their common launch.
constexpr int64_t kMaxPendingBytes = int64_t{64} << 20;

// How K K^T acts, unless it is to be materialised. A small dense factor is one block.
std::optional<SideShape> shape_of(const Layout& layout) {
  const auto shape = [](Action action, int64_t width, int64_t head) {
    return SideShape{action, static_cast<int16_t>(width), static_cast<int16_t>(head)};
  };
  const int64_t border = layout.head + layout.tail;
  switch (layout.family) {
    case Family::kDiagonal:
      return SideShape{};
    case Family::kBlockDiagonal:
      if (layout.block <= kMaxSideWidth) return shape(Action::kBlocks, layout.block, 0);
      break;
    case Family::kBordered:
      if (border > kMaxSideWidth) break;
      return shape(layout.transposed ? Action::kColumnBordered : Action::kRowBordered, border,
                   layout.head);
    case Family::kDense:
      if (layout.dim <= kMaxSideWidth) return shape(Action::kBlocks, layout.dim, 0);
      break;
    case Family::kToeplitz:
      break;
  }
  return std::nullopt;
}

// x F F^T, or F F^T x on the left side.
at::Tensor apply(const LayerFactor& factor, Side side, const at::Tensor& x) {
  if (factor.product.defined()) {
    const at::Tensor product = factor.product.to(x.scalar_type());
    return side == Side::kLeft ? at::mm(product, x) : at::mm(x, product);
  }
  const bool left = side == Side::kLeft;
  const at::Tensor f = factor.storage.to(x.scalar_type());
  return multiply(factor.layout, f, side, !left, multiply(factor.layout, f, side, left, x));
}

// C C^T G K K^T in the dtype that parameters and factors promote to.
at::Tensor preconditioned_gradient(const LayerStep& layer) {
  auto dtype = c10::promoteTypes(layer.K.storage.scalar_type(), layer.C.storage.scalar_type());
  std::vector<at::Tensor> columns;
  for (const Part& part : layer.parts) {
    dtype = c10::promoteTypes(dtype, part.parameter.scalar_type());
    columns.push_back(part.gradient.reshape({layer.C.layout.dim, part.width}));
  }
  for (at::Tensor& part : columns) part = part.to(dtype);
  const at::Tensor gradient = columns.size() == 1 ? columns[0] : at::cat(columns, 1);
  const at::Tensor z = apply(layer.K, Side::kRight, gradient);
  return apply(layer.C, Side::kLeft, z);
}

// Adds a layer with its preconditioned gradient in the place of the gradient.
int64_t add_materialised(StepBatch& batch, int64_t index, const LayerStep& layer) {
  const at::Tensor p = preconditioned_gradient(layer);
  std::vector<Part> parts = layer.parts;
  for (Part& part : parts) part.gradient = p.narrow(1, part.begin, part.width);
  batch.add(index, parts, layer.skipped, StepSide{}, StepSide{});
  return static_cast<int64_t>(p.nbytes());
}

void update(StepBatch& batch, const std::vector<LayerStep>& layers) {
  int64_t pending = 0;
  for (size_t n = 0; n < layers.size(); ++n) {
    const LayerStep& layer = layers[n];
    const auto right = shape_of(layer.K.layout), left = shape_of(layer.C.layout);
    if (right.has_value() && left.has_value()) {
      batch.add(static_cast<int64_t>(n), layer.parts, layer.skipped, {*right, layer.K.storage},
                {*left, layer.C.storage});
    } else {
      pending += add_materialised(batch, static_cast<int64_t>(n), layer);
    }
    if (pending < kMaxPendingBytes) continue;
    batch.launch();
    pending = 0;
  }
  batch.launch();
}

void preconditioned_update_(at::TensorList weight, at::TensorList bias,
                            at::TensorList momentum_weight, at::TensorList momentum_bias,
                            at::TensorList skipped, at::TensorList grad_weight,
                            at::TensorList grad_bias, at::TensorList K, at::TensorList C,
                            at::TensorList P_K, at::TensorList P_C, const std::string& structure_K,
                            const std::string& structure_C, const at::Tensor& lr, double momentum,
                            double weight_decay, at::Tensor& outcomes, at::Tensor& workspace,
                            const std::optional<at::Tensor>& /*products: made by the kernels*/,
                            const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf,
                            std::optional<at::IntArrayRef> rounding) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Device device = outcomes.device();
  const c10::DeviceGuard device_guard(device);
  const StepLists lists{
      weight, bias, momentum_weight, momentum_bias, skipped, grad_weight, grad_bias, K, C,
      P_K,    P_C,  structure_K,     structure_C};
  const std::vector<LayerStep> layers = checked_steps(kOp, lists, momentum != 0, device);
  check_outcomes(kOp, outcomes, layers.size());
  check_on_device(kOp, "workspace", workspace, device);
  for (const LayerStep& layer : layers) {
    TORCH_CHECK_VALUE(layer.K.layout.dim <= INT32_MAX && layer.C.layout.dim <= INT32_MAX,
                      "singd_ext::", kOp, ": weight of shape ", layer.parts[0].parameter.sizes(),
                      " has a dimension beyond 2^31 - 1");
  }

  StepArguments a;
  a.outcomes = outcomes.mutable_data_ptr<int64_t>();
  a.lr = scalar_argument(kOp, "lr", lr, device);
  a.grad_scale = scalar_argument(kOp, "grad_scale", grad_scale, device, 1.0);
  a.found_inf = scalar_argument(kOp, "found_inf", found_inf, device, 0.0);
  a.momentum = momentum;
  a.weight_decay = weight_decay;
  a.key = checked_rounding_key(kOp, rounding);
  if (layers.empty()) return;
  run(kOp, structure_K + "', '" + structure_C, weight[0].sizes(), [&] {
    StepBatch batch(workspace, a, current_stream(outcomes));
    update(batch, layers);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(SINGD_LIBRARY, SINGD_CUDA_KEY, m) {
  m.impl("preconditioned_update_", preconditioned_update_);
}

}  // namespace singd::cuda
