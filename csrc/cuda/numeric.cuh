// Conversions between storage types (float64, float32, bfloat16, float16) and the types in which
// kernels compute: double for float64, float otherwise.
#pragma once

#include <cstring>
#include <type_traits>

#include "../structures/rounding.h"
#include "arguments.h"
#include "device.cuh"
#include "dtype.h"

namespace singd::cuda {

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeType<T>::type;

template <class A, class T>
__device__ __forceinline__ A widen(T value) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<A>(static_cast<float>(value));
  } else {
    return static_cast<A>(value);
  }
}

template <class T, class A>
__device__ __forceinline__ T narrow(A value) {
  if constexpr (sizeof(T) == 2) {
    return T(static_cast<float>(value));  // rounds to nearest
  } else {
    return static_cast<T>(value);
  }
}

template <class A>
__device__ __forceinline__ bool is_finite(A value) {
  return value - value == A(0);
}

// As narrow; bfloat16 rounds stochastically where the key asks for it (csrc/structures/rounding.h).
template <class T, class A>
__device__ __forceinline__ T narrow(A value, const RoundingKey& key, int64_t index) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const float single = static_cast<float>(value);
    if (key.enabled && is_finite(single)) {
      uint32_t bits;
      memcpy(&bits, &single, sizeof bits);
      const uint16_t rounded = key.round_to_bfloat16(bits, index);
      T result;
      memcpy(static_cast<void*>(&result), &rounded, sizeof result);
      return result;
    }
  }
  return narrow<T>(value);
}

// Two numbers rounded to nearest by one instruction.
template <class T>
__device__ __forceinline__ Vec<T, 2> narrow_pair(float low, float high) {
  Vec<T, 2> pair;
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    memcpy(static_cast<void*>(&pair), &both, sizeof pair);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    memcpy(static_cast<void*>(&pair), &both, sizeof pair);
  }
  return pair;
}

// As narrow of each number, of which the first is number `index` of its array.
template <class T, class A, int N>
__device__ __forceinline__ Vec<T, N> narrow(const A (&values)[N], const RoundingKey& key,
                                            int64_t index) {
  Vec<T, N> result;
  if constexpr (sizeof(T) == 2) {
    if (!key.enabled || !std::is_same_v<T, bfloat16>) {
#pragma unroll
      for (int e = 0; e < N; e += 2) {
        const Vec<T, 2> pair = narrow_pair<T>(values[e], values[e + 1]);
        memcpy(static_cast<void*>(result.values + e), &pair, sizeof pair);
      }
      return result;
    }
  }
#pragma unroll
  for (int e = 0; e < N; ++e) result[e] = narrow<T>(values[e], key, index + e);
  return result;
}

// Element `index` of an array whose type is known at run time, and the store to one.
template <class A>
__device__ __forceinline__ A load_as(const void* p, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kFloat64:
      return static_cast<A>(load(static_cast<const double*>(p) + index));
    case Dtype::kFloat32:
      return static_cast<A>(load(static_cast<const float*>(p) + index));
    case Dtype::kBFloat16:
      return widen<A>(load(static_cast<const bfloat16*>(p) + index));
    default:
      return widen<A>(load(static_cast<const float16*>(p) + index));
  }
}

// Returns the stored value.
template <class A>
__device__ __forceinline__ A store_as(void* p, Dtype dtype, int64_t index, A value,
                                      const RoundingKey& key) {
  switch (dtype) {
    case Dtype::kFloat64: {
      store(static_cast<double*>(p) + index, static_cast<double>(value));
      return value;
    }
    case Dtype::kFloat32: {
      const float stored = static_cast<float>(value);
      store(static_cast<float*>(p) + index, stored);
      return static_cast<A>(stored);
    }
    case Dtype::kBFloat16: {
      const bfloat16 stored = narrow<bfloat16>(value, key, index);
      store(static_cast<bfloat16*>(p) + index, stored);
      return widen<A>(stored);
    }
    default: {
      const float16 stored = narrow<float16>(value);
      store(static_cast<float16*>(p) + index, stored);
      return widen<A>(stored);
    }
  }
}

// What a launcher passed as a Scalar.
__device__ __forceinline__ double read(const Scalar& scalar) {
  return scalar.pointer ? load_as<double>(scalar.pointer, scalar.dtype, 0) : scalar.value;
}

}  // namespace singd::cuda
