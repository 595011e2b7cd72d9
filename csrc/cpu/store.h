// Stores of float32 or float64 results in a tensor's own dtype.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstring>

#include "../structures/rounding.h"

namespace singd::cpu {

// value in the narrow type; bfloat16 rounds stochastically where the key asks for it.
template <class Narrow, class T>
Narrow rounded(T value, const RoundingKey& key, int64_t index) {
  if constexpr (std::is_same_v<Narrow, at::BFloat16>) {
    const float narrow = static_cast<float>(value);
    if (key.enabled && std::isfinite(narrow)) {
      uint32_t bits;
      std::memcpy(&bits, &narrow, sizeof bits);
      return at::BFloat16(key.round_to_bfloat16(bits, index), at::BFloat16::from_bits());
    }
  }
  return static_cast<Narrow>(value);
}

// The contiguous array `values` as a new tensor like `like`, and whether all of it is finite.
template <class T>
std::pair<at::Tensor, bool> stored_like(const at::Tensor& like, const T* values,
                                        const RoundingKey& key) {
  at::Tensor out = at::empty_like(like);
  bool finite = true;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like.scalar_type(), "store", [&] {
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < out.numel(); ++i) {
      to[i] = rounded<scalar_t>(values[i], key, i);
      finite &= std::isfinite(static_cast<float>(to[i]));
    }
  });
  return {out, finite};
}

}  // namespace singd::cpu
