// Tensors as the raw arrays of kernels.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels.h"

namespace singd::cpu {

inline Scalar array_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Scalar::kFloat64;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    case at::kHalf:
      return Scalar::kFloat16;
    default:
      return Scalar::kFloat32;
  }
}

template <class T>
constexpr Scalar array_type() {
  return sizeof(T) == sizeof(double) ? Scalar::kFloat64 : Scalar::kFloat32;
}

inline Array array_of(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), array_type(tensor.scalar_type())};
}

inline ConstArray const_array_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), array_type(tensor.scalar_type())};
}

}  // namespace singd::cpu
