// The tensors of a step's layer as its kernels work on them: where they lie, if that is in one of
// four orders, else contiguous copies.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/accumulate.h>

#include <cstdint>
#include <vector>

#include "../call_checks.h"
#include "kernels.h"

namespace singd::cpu {

// How a weight lies in memory.
enum class Order {
  kRows,          // W row by row
  kTurned,        // W^T row by row, as a weight that is applied as x W^T has it
  kChannelsLast,  // each row of W with the channels of a tap side by side
  kChannelsApart  // all rows of W for one channel, then all for the next: a transposed convolution
};

// Positions of a convolution's kernel.
inline int64_t taps_of(const at::Tensor& weight) {
  return c10::multiply_integers(weight.sizes().slice(2));
}

// A view whose rows lie side by side if the tensor is in this order; a bias is in every order.
inline at::Tensor ordered(const at::Tensor& tensor, Order order) {
  if (order == Order::kRows || tensor.dim() < 2) return tensor;
  if (order == Order::kTurned) return tensor.movedim(0, -1);
  return tensor.movedim(1, order == Order::kChannelsLast ? -1 : 0);
}

// With one tap the last two orders are the first two.
inline Order order_of(const at::Tensor& weight) {
  const auto is = [&](Order order) { return ordered(weight, order).is_contiguous(); };
  if (weight.dim() < 2 || weight.is_contiguous()) return Order::kRows;
  if (is(Order::kTurned)) return Order::kTurned;
  if (weight.dim() == 2 || taps_of(weight) > kMostTaps) return Order::kRows;
  if (is(Order::kChannelsLast)) return Order::kChannelsLast;
  return is(Order::kChannelsApart) ? Order::kChannelsApart : Order::kRows;
}

// One part of a layer: views of its tensors, or copies.
struct StagedPart {
  at::Tensor parameter, momentum, gradient;  // contiguous
};

// All parts of a layer, in one order.
struct StagedLayer {
  Order order;
  std::vector<StagedPart> parts;

  StagedLayer(const LayerStep& layer, Order as) : order(as) {
    const auto lines = [&](const at::Tensor& tensor) {
      return tensor.defined() ? ordered(tensor, order).contiguous() : tensor;
    };
    for (const Part& part : layer.parts) {
      parts.push_back({lines(part.parameter), lines(part.momentum), lines(part.gradient)});
    }
  }

  // Of copies, what became of them.
  void copy_back(const LayerStep& layer) const {
    const auto copy = [&](const at::Tensor& from, const at::Tensor& to) {
      if (from.defined() && !from.is_alias_of(to)) ordered(to, order).copy_(from);
    };
    for (size_t i = 0; i < parts.size(); ++i) {
      copy(parts[i].parameter, layer.parts[i].parameter);
      copy(parts[i].momentum, layer.parts[i].momentum);
    }
  }
};

}  // namespace singd::cpu
