// Reading rows (rows.h) in kernels.
#pragma once

#include "numeric.cuh"
#include "rows.h"

namespace singd::cuda {

// One element; the column of ones and zeros beside it follow the last column in memory.
template <class T>
__device__ __forceinline__ T element(const Rows& rows, int64_t offset, int64_t column) {
  if (column < rows.features) {
    return load(static_cast<const T*>(rows.data) + offset + column * rows.column_stride);
  }
  return narrow<T>(column == rows.features ? static_cast<compute_t<T>>(rows.ones)
                                           : compute_t<T>(0));
}

// Columns column ... column + kVector<T> - 1, for RowAccess::kVectors; `column` is a multiple of
// kVector<T>, so that all of them are in memory or none.
template <class T, Cache kCache = Cache::kNormal>
__device__ __forceinline__ Vec<T, kVector<T>> vector(const Rows& rows, int64_t offset,
                                                     int64_t column) {
  using V = Vec<T, kVector<T>>;
  if (column < rows.features) {
    return load<kCache>(
        reinterpret_cast<const V*>(static_cast<const T*>(rows.data) + offset + column));
  }
  V v;
#pragma unroll
  for (int e = 0; e < V::kSize; ++e) {
    const bool is_one = e == 0 && column == rows.features;
    v[e] = narrow<T>(is_one ? static_cast<compute_t<T>>(rows.ones) : compute_t<T>(0));
  }
  return v;
}

// Host: f(T()) with the element type that `dtype` names.
template <class Function>
void visit_type(Dtype dtype, Function&& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kBFloat16:
      return f(bfloat16());
    default:
      return f(float16());
  }
}

// Host: f(integral_constant<RowAccess>) with the rows' access.
template <class Function>
void visit_access(RowAccess access, Function&& f) {
  switch (access) {
    case RowAccess::kVectors:
      return f(std::integral_constant<RowAccess, RowAccess::kVectors>());
    case RowAccess::kColumns:
      return f(std::integral_constant<RowAccess, RowAccess::kColumns>());
    default:
      return f(std::integral_constant<RowAccess, RowAccess::kRows>());
  }
}

}  // namespace singd::cuda
