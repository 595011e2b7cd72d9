// In which form a step takes the matrices of P: by the layer's types and by what the processor has.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "local_product.h"

namespace singd::cpu {

// Numbers of a border from which products of pairs are faster than those of float32 numbers.
inline constexpr int64_t kLeastPairs = 6;

template <class T>
bool is_bfloat16(const StepLayer<T>& layer) {
  for (int i = 0; i < layer.num_parts; ++i) {
    const StepPart& part = layer.parts[i];
    const Scalar momentum = part.momentum.data != nullptr ? part.momentum.type : part.weight.type;
    for (const Scalar type : {part.weight.type, momentum, part.gradient.type}) {
      if (type != Scalar::kBFloat16) return false;
    }
  }
  return true;
}

template <class T>
bool has_float16(const StepLayer<T>& layer) {
  for (int i = 0; i < layer.num_parts; ++i) {
    const StepPart& part = layer.parts[i];
    if (part.weight.type == Scalar::kFloat16 || part.momentum.type == Scalar::kFloat16) return true;
  }
  return false;
}

// Whether there are products, and their sides are diagonal or fill tiles.
template <class T>
bool fills_tiles(const StepLayer<T>& layer) {
  const auto fills = [](const LocalProduct<T>& p) {
    return p.is_pointwise() || fills_tiles(p.width());
  };
  const bool pointwise = layer.left.is_pointwise() && layer.right.is_pointwise();
  return !pointwise && fills(layer.left) && fills(layer.right);
}

// On the left an arrowhead's rows would have to be multiplied twice, since they are rounded behind
// what they take from the border.
template <class T>
bool fills_pairs(const LocalProduct<T>& right, const LocalFactor& factor) {
  return right.kind == LocalKind::kRowBorder && right.border() >= kLeastPairs &&
         factor.storage.type == Scalar::kBFloat16;
}

// For the factor K of a layer, where the processor has tiles or fast products of pairs.
template <class T>
void choose_forms(StepLayer<T>& layer, const LocalFactor& right, bool tiles, bool pairs) {
  if (!is_bfloat16(layer)) return;
  if (tiles && fills_tiles(layer)) {
    layer.left.form = Form::kLeftPlanes;
    layer.right.form = Form::kRightPlanes;
  } else if (pairs && fills_pairs(layer.right, right)) {
    layer.right.form = Form::kRightPairs;
  }
}

}  // namespace singd::cpu
