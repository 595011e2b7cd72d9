// The rows of X or g of one layer as the kernels see them: any dtype and strides in, KFAC-reduce
// and the bias column applied on the way.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "../op_checks.h"
#include "../structures/layout.h"
#include "arrays.h"
#include "kernels.h"

namespace singd::cpu {

// `rows` is [batch, shared, features], of any strides. Without a shared position there is nothing
// to reduce, and no row.
inline RowsView rows_view(const at::Tensor& rows, Shared shared) {
  const int64_t positions = rows.size(1);
  RowsView view{};
  view.array = const_array_of(rows);
  view.batch_stride = rows.stride(0);
  view.shared_stride = rows.stride(1);
  view.feature_stride = rows.stride(2);
  view.reduce = shared != Shared::kExpand;
  view.count = view.reduce && positions > 0 ? rows.size(0) : rows.size(0) * positions;
  view.shared = positions;
  view.features = rows.size(2);
  // Samples that follow one another are positions of one.
  if (!view.reduce && view.batch_stride == positions * view.shared_stride) {
    view.shared = view.count;
  }
  view.scale = shared == Shared::kMean ? 1.0 / static_cast<double>(positions) : 1.0;
  view.one = shared == Shared::kSum ? static_cast<double>(positions) : 1.0;
  return view;
}

// f(chunk, m) with m rows as a contiguous m x dim array, for products of size that ATen takes:
// enough rows that dense factors apply K to U = X^T X instead of to X, and few enough to bound the
// memory.
template <class T, class Function>
void for_each_chunk(const at::Tensor& rows, const RowsView& view, const Layout& layout,
                    Function f) {
  const int64_t d = layout.dim;
  const int64_t size = layout.family == Family::kDense
                           ? std::max<int64_t>(512, 8 * d)
                           : std::clamp<int64_t>((int64_t{1} << 18) / d, 64, 512);
  const bool in_place = rows.scalar_type() == c10::CppTypeToScalarType<T>::value &&
                        rows.is_contiguous() && view.features == d && !view.reduce;
  std::vector<T> chunk(in_place ? 0 : std::min(size, view.count) * d);
  for (int64_t first = 0; first < view.count; first += size) {
    const int64_t count = std::min(size, view.count - first);
    if (in_place) {
      f(rows.const_data_ptr<T>() + first * d, count);
      continue;
    }
    at::parallel_for(0, count, std::max<int64_t>(1, 32768 / d), [&](int64_t begin, int64_t end) {
      kernels().statistic<T>().load(view, first + begin, end - begin, 0, d,
                                    chunk.data() + begin * d, d);
    });
    f(chunk.data(), count);
  }
}

}  // namespace singd::cpu
