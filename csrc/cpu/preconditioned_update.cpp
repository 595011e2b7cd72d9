// preconditioned_update_: the step of a list of layers,
//
//   M <- alpha2 M + C C^T (dl/dW) K K^T + gamma W      W <- W - beta2 M
//
// with W = [weight, bias] as one d_o x d_i matrix that is never put together in memory. A layer
// whose preconditioned gradient is not finite keeps W and M bit for bit.
//
// Products with diagonal, block-diagonal and bordered factors are local: all such layers go through
// the vectorised kernels together (local_step.h). Dense and Toeplitz factors need the whole
// gradient: ATen's products leave the preconditioned gradient in the workspace, and the same
// kernels write it.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../call_checks.h"
#include "../structures/registry.h"
#include "arrays.h"
#include "local_step.h"
#include "math.h"
#include "staged.h"
#include "toeplitz_product.h"

namespace singd::cpu {
namespace {

constexpr const char* kOp = "preconditioned_update_";

struct Options {
  double lr, momentum, weight_decay, unscale;
};

at::ScalarType step_type(const LayerStep& layer) {
  auto dtype = c10::promoteTypes(layer.K.storage.scalar_type(), layer.C.storage.scalar_type());
  for (const Part& part : layer.parts) {
    dtype = c10::promoteTypes(dtype, part.parameter.scalar_type());
  }
  return compute_type(dtype);
}

// Where a part's numbers are in the layer and in memory.
void place_part(StepPart& part, const Part& of, int64_t rows, Order order) {
  part.height = rows;
  part.begin = of.begin;
  part.width = of.width;
  if (order == Order::kTurned) {
    std::swap(part.row_begin, part.begin);
    std::swap(part.height, part.width);
  }
  part.gradient_stride = part.width;
  if (of.parameter.dim() < 3 || order == Order::kRows || order == Order::kTurned) return;
  part.taps = taps_of(of.parameter);
  if (order == Order::kChannelsLast) return;
  part.apart = rows * part.taps;
  part.gradient_stride = part.taps;
}

template <class T>
StepLayer<T> step_layer(const LayerStep& layer, const StagedLayer& staged, const Options& options,
                        const RoundingKey& key) {
  StepLayer<T> step;
  step.rows = layer.C.layout.dim;
  step.columns = layer.K.layout.dim;
  step.options = {options.lr, options.momentum, options.weight_decay, options.unscale};
  for (size_t i = 0; i < layer.parts.size(); ++i) {
    const StagedPart& own = staged.parts[i];
    StepPart& part = step.parts[step.num_parts++];
    part.weight = array_of(own.parameter);
    if (own.momentum.defined()) part.momentum = array_of(own.momentum);
    part.gradient = const_array_of(own.gradient);
    part.key = key.stream(i);
    place_part(part, layer.parts[i], step.rows, staged.order);
  }
  step.is_turned = staged.order == Order::kTurned;
  if (step.is_turned) std::swap(step.rows, step.columns);
  return step;
}

LocalFactor local_factor(const LayerFactor& factor) {
  return {factor.layout, const_array_of(factor.storage), factor.storage.numel()};
}

// The step's gradient is the matrix p from now on.
template <class T>
void use_matrix(StepLayer<T>& step, ConstArray p, int64_t element_size) {
  for (int i = 0; i < step.num_parts; ++i) {
    StepPart& part = step.parts[i];
    part.gradient = {static_cast<const char*>(p.data) + part.begin * element_size, p.type};
    part.gradient_stride = step.columns;
  }
}

// P <- F F^T P on the left or P F F^T on the right. The result is in p; scratch is as large.
template <class T>
void precondition(const LayerFactor& factor, Side side, int64_t other, T*& p, T*& scratch) {
  const Layout& layout = factor.layout;
  const int64_t d = layout.dim;
  const auto dtype = scalar_type<T>();
  if (factor.product.defined()) {
    const at::Tensor product = factor.product.to(dtype);
    const MatrixView<const T> square{product.const_data_ptr<T>(), d};
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

// The largest Toeplitz factors that were measured: bfloat16 panels took less time than the FFT.
constexpr int64_t kPanelToeplitz = 3100;

// Whether products with a factor can be ATen's in its own type. Toeplitz ones have the FFT, which
// is faster than bfloat16 products where the processor has no instructions for them.
bool multiplies_as_stored(const Layout& layout) {
  if (layout.family != Family::kToeplitz) return layout.family == Family::kDense;
  return layout.dim <= kPanelToeplitz && bfloat16_gram_rows() != nullptr;
}

// Whether ATen can multiply in bfloat16, with sums in float32: it rounds what lies between two
// products, which saves three quarters of their time.
bool multiplies_in_bfloat16(const LayerStep& layer, const StagedLayer& staged) {
  bool all = true;
  for (const LayerFactor* factor : {&layer.K, &layer.C}) {
    all &= multiplies_as_stored(factor->layout);
    all &= factor->storage.scalar_type() == at::kBFloat16;
    all &= !factor->product.defined() || factor->product.scalar_type() == at::kBFloat16;
  }
  for (const StagedPart& part : staged.parts) all &= part.gradient.scalar_type() == at::kBFloat16;
  return all;
}

// F (F^T X), or (X F) F^T.
at::Tensor multiply_toeplitz(const LayerFactor& factor, Side side, const at::Tensor& x) {
  const at::Tensor y = at::empty_like(x), z = at::empty_like(x);
  const auto* a = factor.storage.const_data_ptr<at::BFloat16>();
  const bool is_upper = !factor.layout.transposed;
  ToeplitzPanels(a, factor.layout.dim, is_upper).multiply(side, x, y);
  ToeplitzPanels(a, factor.layout.dim, !is_upper).multiply(side, y, z);
  return z;
}

// F F^T X, or X F F^T.
at::Tensor multiply_bfloat16(const LayerFactor& factor, Side side, const at::Tensor& x) {
  const auto times = [&](const at::Tensor& f, const at::Tensor& y) {
    return side == Side::kLeft ? at::mm(f, y) : at::mm(y, f);
  };
  if (factor.product.defined()) return times(factor.product, x);
  if (factor.layout.family == Family::kToeplitz) return multiply_toeplitz(factor, side, x);
  const int64_t d = factor.layout.dim;
  const at::Tensor f = factor.storage.view({d, d});
  return side == Side::kLeft ? times(f, times(f.t(), x)) : times(f.t(), times(f, x));
}

at::Tensor precondition_bfloat16(const LayerStep& layer, const StagedLayer& staged) {
  const int64_t rows = layer.C.layout.dim, columns = layer.K.layout.dim;
  at::Tensor gradient = staged.parts[0].gradient.view({rows, layer.parts[0].width});
  if (staged.parts.size() > 1) {
    gradient = gradient.new_empty({rows, columns});
    for (size_t i = 0; i < staged.parts.size(); ++i) {
      const int64_t width = layer.parts[i].width;
      gradient.narrow(1, layer.parts[i].begin, width)
          .copy_(staged.parts[i].gradient.view({rows, width}));
    }
  }
  return multiply_bfloat16(layer.K, Side::kRight,
                           multiply_bfloat16(layer.C, Side::kLeft, gradient));
}

// A layer with a dense or Toeplitz factor; `workspaces` are two pieces of memory.
template <class T>
bool update_whole(const LayerStep& layer, const Options& options, const RoundingKey& key,
                  at::Tensor& matrices, at::Tensor& workspace) {
  const StagedLayer staged(layer, Order::kRows);
  StepLayer<T> step = step_layer<T>(layer, staged, options, key);
  at::Tensor result;
  if (multiplies_in_bfloat16(layer, staged)) {
    result = precondition_bfloat16(layer, staged);
    use_matrix(step, const_array_of(result), result.element_size());
  } else {
    T *p = nullptr, *scratch = nullptr;
    Arena::run(matrices, [&](Arena& arena) {
      p = arena.take<T>(step.rows * step.columns);
      scratch = arena.take<T>(step.rows * step.columns);
    });
    AtenMath::parallel_for(step.rows, step.columns, [&](int64_t begin, int64_t end) {
      kernels().step<T>().load(step, {begin, end, 0, step.columns}, p + begin * step.columns,
                               step.columns);
    });
    step.options.unscale = 1;
    precondition(layer.C, Side::kLeft, step.columns, p, scratch);
    precondition(layer.K, Side::kRight, step.rows, p, scratch);
    use_matrix(step, {p, array_type<T>()}, sizeof(T));
  }
  LocalStep<T> local(workspace, nullptr);
  local.add(step);
  bool updated = false;
  local.run([&](size_t, bool ok) { updated = ok; });
  if (updated) staged.copy_back(layer);
  return updated;
}

// The layers that compute in T; report(index, whether it was updated).
template <class T, class Function>
void update_layers(const std::vector<LayerStep>& layers, const Options& options,
                   const RoundingKey& key, at::Tensor& workspace, at::Tensor* products,
                   Function report) {
  LocalStep<T> local(workspace, products);
  local.reserve(layers.size());
  std::vector<StagedLayer> staged;
  std::vector<size_t> indices;
  staged.reserve(layers.size());
  indices.reserve(layers.size());
  at::Tensor matrices;
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerStep& layer = layers[i];
    if (step_type(layer) != scalar_type<T>()) continue;
    if (!layer.K.layout.is_local() || !layer.C.layout.is_local()) {
      if (!matrices.defined()) matrices = workspace.new_empty({0});
      report(i, update_whole<T>(layer, options, key.stream(i), matrices, workspace));
      continue;
    }
    staged.emplace_back(layer, order_of(layer.parts[0].parameter));
    const StepLayer<T> step = step_layer<T>(layer, staged.back(), options, key.stream(i));
    const LocalFactor C = local_factor(layer.C), K = local_factor(layer.K);
    local.add(step, step.is_turned ? K : C, step.is_turned ? C : K);
    indices.push_back(i);
  }
  local.run([&](size_t local_index, bool updated) {
    const size_t i = indices[local_index];
    if (updated) staged[local_index].copy_back(layers[i]);
    report(i, updated);
  });
}

void preconditioned_update_(at::TensorList weight, at::TensorList bias,
                            at::TensorList momentum_weight, at::TensorList momentum_bias,
                            at::TensorList skipped, at::TensorList grad_weight,
                            at::TensorList grad_bias, at::TensorList K, at::TensorList C,
                            at::TensorList P_K, at::TensorList P_C, const std::string& structure_K,
                            const std::string& structure_C, const at::Tensor& lr, double momentum,
                            double weight_decay, at::Tensor& outcomes, at::Tensor& workspace,
                            const std::optional<at::Tensor>& products,
                            const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf,
                            std::optional<at::IntArrayRef> rounding) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const StepLists lists{
      weight, bias, momentum_weight, momentum_bias, skipped, grad_weight, grad_bias, K, C,
      P_K,    P_C,  structure_K,     structure_C};
  const std::vector<LayerStep> layers = checked_steps(kOp, lists, momentum != 0, outcomes.device());
  check_outcomes(kOp, outcomes, layers.size());
  check_on_device(kOp, "workspace", workspace, outcomes.device());
  if (products.has_value()) check_on_device(kOp, "products", *products, outcomes.device());
  const Scaler scaler = checked_scaler(kOp, grad_scale, found_inf);
  const Options options{checked_scalar(kOp, "lr", lr), momentum, weight_decay, scaler.unscale};
  const RoundingKey key = checked_rounding_key(kOp, rounding);

  outcomes.zero_();
  if (scaler.found_inf) return;
  const auto report = [&](size_t i, bool updated) {
    if (updated) return;
    skipped[i].add_(1);
    outcomes.mutable_data_ptr<int64_t>()[i] = 1;
  };
  // Those that are kept must be of one type throughout, so that their size tells whose they are.
  const auto is_double = [](const LayerStep& layer) { return step_type(layer) == at::kDouble; };
  const auto doubles = std::count_if(layers.begin(), layers.end(), is_double);
  const bool has_doubles = doubles > 0;
  const bool has_floats = doubles < static_cast<int64_t>(layers.size());
  at::Tensor memory = products.value_or(at::Tensor());
  at::Tensor* kept = (has_doubles && has_floats) || !products.has_value() ? nullptr : &memory;
  if (has_floats) update_layers<float>(layers, options, key, workspace, kept, report);
  if (has_doubles) update_layers<double>(layers, options, key, workspace, kept, report);
}

}  // namespace

TORCH_LIBRARY_IMPL(singd_ext, CPU, m) { m.impl("preconditioned_update_", preconditioned_update_); }

}  // namespace singd::cpu
