// preconditioned_update_ (see csrc/cpu/preconditioned_update.cpp for what it computes). Layers
// whose factors are both diagonal, or block-diagonal or bordered with blocks and borders of at most
// 64, are updated by a few launches for all of them. For others the preconditioned gradient is
// computed by ATen and handed to the same kernels as a gradient with the identity on both sides.
#include "preconditioned_update.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "../op_checks.h"
#include "products.h"
#include "runtime.h"
#include "step_batch.h"

namespace singd::cuda {
namespace {

constexpr const char* kOp = "preconditioned_update_";
// Preconditioned gradients that wait in memory for their common launch.
constexpr int64_t kMaxPendingBytes = int64_t{64} << 20;

struct Layer {
  std::vector<StepPart> parts;
  at::Tensor skipped, K, C, P_K, P_C;  // P_K and P_C: undefined or empty where nothing is cached
  Layout layout_K, layout_C;
};

void check_part(const char* name, const StepPart& part, int64_t rows, const at::Device& device) {
  check_dtype(kOp, name, part.parameter);
  check_dtype(kOp, name, part.gradient);
  at::assert_no_internal_overlap(part.parameter);
  TORCH_CHECK_VALUE(part.gradient.sizes() == part.parameter.sizes(), "singd_ext::", kOp, ": ", name,
                    " has shape ", part.parameter.sizes(), " but its gradient has shape ",
                    part.gradient.sizes());
  TORCH_CHECK_VALUE(part.parameter.dim() >= 1 && part.parameter.size(0) == rows, "singd_ext::", kOp,
                    ": ", name, " of shape ", part.parameter.sizes(), " does not have ", rows,
                    " rows");
  check_on_device(kOp, name, part.parameter, device);
  check_on_device(kOp, "a gradient", part.gradient, device);
  if (!part.momentum.defined()) return;
  check_dtype(kOp, name, part.momentum);
  at::assert_no_internal_overlap(part.momentum);
  TORCH_CHECK_VALUE(part.momentum.sizes() == part.parameter.sizes(), "singd_ext::", kOp, ": ", name,
                    " has shape ", part.parameter.sizes(), " but its momentum has shape ",
                    part.momentum.sizes());
  check_on_device(kOp, "a momentum", part.momentum, device);
}

void check_counts(const char* name, const at::Tensor& tensor, int64_t count,
                  const at::Device& device) {
  TORCH_CHECK_VALUE(
      tensor.scalar_type() == at::kLong && tensor.numel() == count && tensor.is_contiguous(),
      "singd_ext::", kOp, ": ", name, " must be int64 with ", count, " contiguous entries, but is ",
      tensor.scalar_type(), " of shape ", tensor.sizes());
  check_on_device(kOp, name, tensor, device);
}

void check_cached(const char* name, const at::Tensor& product, int64_t dim,
                  const at::Device& device) {
  if (!product.defined() || product.numel() == 0) return;
  check_dtype(kOp, name, product);
  TORCH_CHECK_VALUE(product.dim() == 2 && product.size(0) == dim && product.size(1) == dim,
                    "singd_ext::", kOp, ": ", name, " has shape ", product.sizes(), ", expected [",
                    dim, ", ", dim, "]");
  check_on_device(kOp, name, product, device);
}

void check_layer(Layer& layer, const std::string& structure_K, const std::string& structure_C,
                 const at::Device& device) {
  const int64_t rows = layer.parts.front().parameter.size(0);
  check_part("weight", layer.parts.front(), rows, device);
  if (layer.parts.size() > 1) check_part("bias", layer.parts.back(), rows, device);
  const int64_t columns = layer.parts.front().width + (layer.parts.size() > 1 ? 1 : 0);
  TORCH_CHECK_VALUE(rows <= INT32_MAX && columns <= INT32_MAX, "singd_ext::", kOp,
                    ": weight of shape ", layer.parts.front().parameter.sizes(),
                    " has a dimension beyond 2^31 - 1");
  layer.layout_K = checked_layout(kOp, structure_K, columns);
  layer.layout_C = checked_layout(kOp, structure_C, rows);
  check_factor(kOp, "K", layer.K, structure_K, layer.layout_K);
  check_factor(kOp, "C", layer.C, structure_C, layer.layout_C);
  check_on_device(kOp, "K", layer.K, device);
  check_on_device(kOp, "C", layer.C, device);
  check_cached("P_K", layer.P_K, columns, device);
  check_cached("P_C", layer.P_C, rows, device);
  check_counts("skipped", layer.skipped, 1, device);
}

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

// x K K^T, or K K^T x on the left side.
at::Tensor apply(const Layout& layout, const at::Tensor& factor, const at::Tensor& cached,
                 Side side, const at::Tensor& x) {
  if (cached.defined() && cached.numel() > 0) {
    const at::Tensor product = cached.to(x.scalar_type());
    return side == Side::kLeft ? at::mm(product, x) : at::mm(x, product);
  }
  const bool left = side == Side::kLeft;
  const at::Tensor k = factor.to(x.scalar_type());
  return multiply(layout, k, side, !left, multiply(layout, k, side, left, x));
}

// C C^T G K K^T in the dtype that parameters and factors promote to.
at::Tensor preconditioned_gradient(const Layer& layer) {
  auto dtype = c10::promoteTypes(layer.K.scalar_type(), layer.C.scalar_type());
  std::vector<at::Tensor> columns;
  for (const StepPart& part : layer.parts) {
    dtype = c10::promoteTypes(dtype, part.parameter.scalar_type());
    columns.push_back(part.gradient.reshape({layer.layout_C.dim, part.width}));
  }
  for (at::Tensor& part : columns) part = part.to(dtype);
  const at::Tensor gradient = columns.size() == 1 ? columns[0] : at::cat(columns, 1);
  const at::Tensor z = apply(layer.layout_K, layer.K, layer.P_K, Side::kRight, gradient);
  return apply(layer.layout_C, layer.C, layer.P_C, Side::kLeft, z);
}

// Adds a layer with its preconditioned gradient in the place of the gradient.
int64_t add_materialised(StepBatch& batch, int64_t index, const Layer& layer) {
  const at::Tensor p = preconditioned_gradient(layer);
  std::vector<StepPart> parts = layer.parts;
  int64_t begin = 0;
  for (StepPart& part : parts) {
    part.gradient = p.narrow(1, begin, part.width);
    begin += part.width;
  }
  batch.add(index, parts, layer.skipped, StepSide{}, StepSide{});
  return static_cast<int64_t>(p.nbytes());
}

void update(StepBatch& batch, const std::vector<Layer>& layers) {
  int64_t pending = 0;
  for (size_t n = 0; n < layers.size(); ++n) {
    const Layer& layer = layers[n];
    const auto right = shape_of(layer.layout_K), left = shape_of(layer.layout_C);
    if (right.has_value() && left.has_value()) {
      batch.add(static_cast<int64_t>(n), layer.parts, layer.skipped, {*right, layer.K},
                {*left, layer.C});
    } else {
      pending += add_materialised(batch, static_cast<int64_t>(n), layer);
    }
    if (pending < kMaxPendingBytes) continue;
    batch.launch();
    pending = 0;
  }
  batch.launch();
}

RoundingKey rounding_key(std::optional<at::IntArrayRef> key) {
  if (!key.has_value()) return {};
  TORCH_CHECK_VALUE(key->size() == 2, "singd_ext::", kOp, ": rounding_key must be [seed, step]");
  return RoundingKey::make((*key)[0], (*key)[1]);
}

void preconditioned_update_(at::TensorList weight, at::TensorList bias,
                            at::TensorList momentum_weight, at::TensorList momentum_bias,
                            at::TensorList skipped, at::TensorList grad_weight,
                            at::TensorList grad_bias, at::TensorList K, at::TensorList C,
                            at::TensorList P_K, at::TensorList P_C, const std::string& structure_K,
                            const std::string& structure_C, const at::Tensor& lr, double momentum,
                            double weight_decay, at::Tensor& outcomes, at::Tensor& workspace,
                            const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf,
                            std::optional<at::IntArrayRef> rounding) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const size_t layers = weight.size(), momenta = momentum != 0 ? layers : 0;
  check_length(kOp, "bias", bias.size(), layers);
  check_length(kOp, "momentum_weight", momentum_weight.size(), momenta);
  check_length(kOp, "momentum_bias", momentum_bias.size(), momenta);
  check_length(kOp, "skipped", skipped.size(), layers);
  check_length(kOp, "grad_weight", grad_weight.size(), layers);
  check_length(kOp, "grad_bias", grad_bias.size(), layers);
  check_length(kOp, "K", K.size(), layers);
  check_length(kOp, "C", C.size(), layers);
  if (!P_K.empty()) check_length(kOp, "P_K", P_K.size(), layers);
  if (!P_C.empty()) check_length(kOp, "P_C", P_C.size(), layers);
  const at::Device device = outcomes.device();
  check_counts("outcomes", outcomes, static_cast<int64_t>(layers), device);
  check_on_device(kOp, "workspace", workspace, device);
  const c10::DeviceGuard device_guard(device);

  std::vector<Layer> checked;
  for (size_t n = 0; n < layers; ++n) {
    TORCH_CHECK_VALUE(weight[n].dim() >= 1 && weight[n].numel() > 0, "singd_ext::", kOp,
                      ": weight of shape ", weight[n].sizes(), " is empty");
    Layer layer;
    layer.parts = {{weight[n], momenta ? momentum_weight[n] : at::Tensor(), grad_weight[n],
                    weight[n].numel() / weight[n].size(0)}};
    if (bias[n].numel() > 0) {  // a layer without bias holds its place with an empty tensor
      layer.parts.push_back({bias[n], momenta ? momentum_bias[n] : at::Tensor(), grad_bias[n], 1});
    }
    layer.skipped = skipped[n];
    layer.K = K[n];
    layer.C = C[n];
    if (!P_K.empty()) layer.P_K = P_K[n];
    if (!P_C.empty()) layer.P_C = P_C[n];
    check_layer(layer, structure_K, structure_C, device);
    checked.push_back(std::move(layer));
  }

  StepArguments a;
  a.outcomes = outcomes.mutable_data_ptr<int64_t>();
  a.lr = scalar_argument(kOp, "lr", lr, device);
  a.grad_scale = scalar_argument(kOp, "grad_scale", grad_scale, device, 1.0);
  a.found_inf = scalar_argument(kOp, "found_inf", found_inf, device, 0.0);
  a.momentum = momentum;
  a.weight_decay = weight_decay;
  a.key = rounding_key(rounding);
  if (layers == 0) return;
  run(kOp, structure_K + "', '" + structure_C, weight[0].sizes(), [&] {
    StepBatch batch(workspace, a, current_stream(outcomes));
    update(batch, checked);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(SINGD_LIBRARY, SINGD_CUDA_KEY, m) {
  m.impl("preconditioned_update_", preconditioned_update_);
}

}  // namespace singd::cuda
