#include "step_batch.h"

#include <algorithm>

#include "matrix_operands.h"
#include "runtime.h"

namespace singd::cuda {
namespace {

constexpr int64_t kAlignment = 256;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool is_vector_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The elements of a tensor [rows, ...] as rows * width with rows `pitch` apart.
struct Rows {
  at::Tensor tensor;
  int64_t pitch;
};

// Without a copy where columns are neighbours.
Rows in_rows(const at::Tensor& tensor, int64_t width) {
  if (tensor.is_contiguous()) return {tensor, width};
  const bool neighbours = width == 1 || (tensor.dim() == 2 && tensor.stride(1) == 1);
  if (neighbours && tensor.stride(0) >= 0 && tensor.stride(0) <= INT32_MAX) {
    return {tensor, tensor.stride(0)};
  }
  return {tensor.contiguous(), width};
}

int8_t code_of(const at::Tensor& tensor) { return static_cast<int8_t>(dtype_of(tensor)); }

// Whether this layer's weight, momentum and gradient can move in vectors; bias columns are few, but
// are read with the same element type.
bool moves_in_vectors(const StepLayer& l, bool has_momentum, Dtype compute) {
  const auto element = static_cast<Dtype>(l.parameter_dtype[0]);
  if (compute != (element == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32)) return false;
  for (int part = 0; part < (l.bias == nullptr ? 1 : 2); ++part) {
    const int8_t code = l.parameter_dtype[0];
    if (l.parameter_dtype[part] != code || l.gradient_dtype[part] != code) return false;
    if (has_momentum && l.momentum_dtype[part] != code) return false;
  }
  return l.weight_columns() % (16 / size_of(element)) == 0 && is_vector_aligned(l.weight) &&
         is_vector_aligned(l.momentum_weight);
}

StepFactor factor_of(const StepSide& side, int64_t dim, bool is_left) {
  StepFactor factor;
  factor.shape = side.shape;
  factor.dim = static_cast<int32_t>(dim);
  factor.is_left = is_left;
  if (side.factor.defined()) {
    factor.factor = side.factor.const_data_ptr();
    factor.dtype = code_of(side.factor);
  }
  return factor;
}

Dtype compute_dtype(const std::vector<Part>& parts, const StepSide& right, const StepSide& left) {
  const auto is_double = [](const at::Tensor& t) {
    return t.defined() && t.scalar_type() == at::kDouble;
  };
  bool any = is_double(right.factor) || is_double(left.factor);
  for (const Part& part : parts) {
    any = any || is_double(part.parameter) || is_double(part.gradient);
  }
  return any ? Dtype::kFloat64 : Dtype::kFloat32;
}

}  // namespace

// As on the CPU, a parameter or momentum that is not contiguous is updated in a contiguous copy.
at::Tensor StepBatch::contiguous(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  at::Tensor copy = tensor.contiguous();
  write_backs_.emplace_back(tensor, copy);
  return copy;
}

StepBatch::Group& StepBatch::group_of(const StepKind& kind, bool tiled) {
  for (Group& group : groups_) {
    if (group.tiled == tiled && group.kind.in_vectors == kind.in_vectors &&
        group.kind.element == kind.element && group.kind.compute == kind.compute &&
        group.kind.uses_matrices == kind.uses_matrices &&
        group.kind.right_blocks == kind.right_blocks &&
        group.kind.left_blocks == kind.left_blocks && group.kind.wide_tiles == kind.wide_tiles) {
      return group;
    }
  }
  groups_.push_back({kind, tiled, {}, {}});
  return groups_.back();
}

void StepBatch::add(int64_t index, const std::vector<Part>& parts, const at::Tensor& skipped,
                    const StepSide& right, const StepSide& left) {
  StepLayer l;
  l.index = static_cast<int32_t>(index);
  l.rows = static_cast<int32_t>(parts[0].parameter.size(0));
  l.columns = static_cast<int32_t>(parts[0].width + (parts.size() > 1 ? 1 : 0));
  l.right = right.shape;
  l.left = left.shape;
  l.skipped = skipped.mutable_data_ptr<int64_t>();
  const bool has_momentum = parts[0].momentum.defined();
  for (size_t n = 0; n < parts.size(); ++n) {
    const at::Tensor parameter = contiguous(parts[n].parameter);
    const Rows gradient = in_rows(parts[n].gradient, parts[n].width);
    alive_.push_back(gradient.tensor);
    l.parameter_dtype[n] = code_of(parameter);
    l.gradient_dtype[n] = code_of(gradient.tensor);
    (n == 0 ? l.weight : l.bias) = parameter.mutable_data_ptr();
    (n == 0 ? l.gradient : l.gradient_bias) = gradient.tensor.const_data_ptr();
    (n == 0 ? l.gradient_pitch : l.gradient_bias_pitch) = static_cast<int32_t>(gradient.pitch);
    if (!has_momentum) continue;
    const at::Tensor momentum = contiguous(parts[n].momentum);
    l.momentum_dtype[n] = code_of(momentum);
    (n == 0 ? l.momentum_weight : l.momentum_bias) = momentum.mutable_data_ptr();
  }
  StepKind kind;
  kind.compute = compute_dtype(parts, right, left);
  kind.in_vectors = moves_in_vectors(l, has_momentum, kind.compute);
  if (kind.in_vectors) {
    kind.element = static_cast<Dtype>(l.parameter_dtype[0]);
    l.gradient_in_vectors =
        l.gradient_pitch % (16 / size_of(kind.element)) == 0 && is_vector_aligned(l.gradient);
  }
  const bool tiled = l.right.action != Action::kDiagonal || l.left.action != Action::kDiagonal;
  kind.uses_matrices = tiled && fits_matrix_update(l, kind);
  if (!tiled) {
    plan_stream_update(l);
  } else if (kind.uses_matrices) {
    kind.right_blocks = l.right.action == Action::kBlocks;
    kind.left_blocks = l.left.action == Action::kBlocks;
    plan_matrix_products(l);
    plan_matrix_update(l, kind);
    kind.wide_tiles = l.wide_tiles();
  } else {
    plan_tiled_update(l, kind);
  }
  Group& group = group_of(kind, tiled);
  group.layers.push_back(l);
  group.factors.push_back(factor_of(right, l.columns, false));
  group.factors.push_back(factor_of(left, l.rows, true));
  for (const StepSide* side : {&right, &left}) alive_.push_back(side->factor);
}

// The workspace: the tickets and counters, zeros at first, then the layers' arrays.
void StepBatch::launch(Group& group, size_t begin, int count) {
  StepLayer* const layers = group.layers.data() + begin;
  StepFactor* const factors = group.factors.data() + 2 * begin;
  const int64_t element = size_of(group.kind.compute);
  const int64_t counter_bytes = aligned(4 * (kCounters * (count + 1)));
  int64_t bytes = counter_bytes;
  const auto bytes_of = [&](const StepLayer& l) {
    return aligned((StepOffsets(l).size + MatrixOffsets(l).size) * element);
  };
  for (int n = 0; n < count; ++n) bytes += bytes_of(layers[n]);
  auto* const start = static_cast<char*>(workspace_of(workspace_, bytes + kAlignment));
  const int64_t shift =
      aligned(reinterpret_cast<intptr_t>(start)) - reinterpret_cast<intptr_t>(start);
  char* at = start + shift;
  StepArguments arguments = arguments_;
  int* const ticket = reinterpret_cast<int*>(at);
  arguments.counters = ticket + kCounters;
  clear_counters(ticket, counter_bytes / 4, stream_);
  at += counter_bytes;
  for (int n = 0; n < count; ++n) {
    StepLayer& l = layers[n];
    const StepOffsets offsets(l);
    l.slot = factors[2 * n].slot = factors[2 * n + 1].slot = n;
    l.workspace = at;
    factors[2 * n].delta = at + offsets.right_delta * element;
    factors[2 * n + 1].delta = at + offsets.left_delta * element;
    at += bytes_of(l);
  }
  prepare_step(factors, 2 * count, group.kind.compute, arguments.counters, stream_);
  if (!group.tiled) return stream_update(layers, count, group.kind, arguments, ticket, stream_);
  // From the last layer to the first, whose G is then in the cache when the updates begin.
  std::reverse(layers, layers + count);
  if (fits_matrix_products(layers, count, group.kind)) {
    matrix_products(layers, count, group.kind, arguments, stream_);
  } else {
    thin_products(layers, count, group.kind, arguments, ticket + 1, stream_);
  }
  std::reverse(layers, layers + count);
  thin_row_products(layers, count, group.kind.compute, stream_);
  thin_results(layers, count, group.kind.compute, stream_);
  if (!group.kind.uses_matrices) {
    return tiled_update(layers, count, group.kind, arguments, ticket, stream_);
  }
  matrix_update(layers, count, group.kind, arguments, ticket, stream_);
}

void StepBatch::launch() {
  for (Group& group : groups_) {
    for (size_t begin = 0; begin < group.layers.size(); begin += kMaxStepLayers) {
      const size_t count = std::min<size_t>(kMaxStepLayers, group.layers.size() - begin);
      launch(group, begin, static_cast<int>(count));
    }
  }
  for (auto& [tensor, copy] : write_backs_) tensor.copy_(copy);
  groups_.clear();
  write_backs_.clear();
  alive_.clear();
}

}  // namespace singd::cuda
