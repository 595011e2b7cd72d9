// Typed arrays and paddings, which all kernels share. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../structures/layout.h"
#include "../structures/rounding.h"

namespace singd::cpu {

// Of functions that several instruction sets compile: the linker must not choose one's copy.
#define SINGD_INLINE_EVERYWHERE inline __attribute__((always_inline))

enum class Scalar { kFloat64, kFloat32, kBFloat16, kFloat16 };
SINGD_HOST_DEVICE inline constexpr int64_t size_of(Scalar type) {
  return type == Scalar::kFloat64 ? 8 : type == Scalar::kFloat32 ? 4 : 2;
}

// A typed array.
struct Array {
  void* data = nullptr;
  Scalar type = Scalar::kFloat32;
};
struct ConstArray {
  const void* data = nullptr;
  Scalar type = Scalar::kFloat32;
};

// Rows of small matrices are padded to whole vectors of every instruction set, with zeros.
inline constexpr int64_t kPadding = 16;
SINGD_HOST_DEVICE inline constexpr int64_t padded(int64_t n) {
  return (n + kPadding - 1) / kPadding * kPadding;
}
// Numbers from row to row of a matrix with many columns: a line more than they take. Rows whose
// distance is a multiple of 4 KB share few places of the first cache.
SINGD_HOST_DEVICE inline constexpr int64_t spaced(int64_t n) { return padded(n) + kPadding; }

}  // namespace singd::cpu
