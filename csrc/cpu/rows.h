// The rows of X or g of one layer, brought in cache-sized chunks to a contiguous array of the type
// that products use: any dtype and strides in, KFAC-reduce and the bias column applied on the way.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../op_checks.h"
#include "../structures/layout.h"

namespace singd::cpu {

class Rows {
 public:
  // `rows` is [batch, shared, features], of any strides.
  Rows(at::Tensor rows, bool ones_column, Shared shared)
      : rows_(std::move(rows)), ones_column_(ones_column), shared_(shared) {}

  int64_t dim() const { return rows_.size(2) + (ones_column_ ? 1 : 0); }
  // Without a shared position there is nothing to reduce, and no row.
  int64_t count() const {
    const int64_t positions = rows_.size(0) * rows_.size(1);
    return shared_ == Shared::kExpand || positions == 0 ? positions : rows_.size(0);
  }

  // f(chunk, m) with the chunk's m rows as a contiguous m x dim() array.
  template <class T, class Function>
  void for_each_chunk(const Layout& layout, Function f) const {
    const int64_t size = chunk_size(layout);
    if (is_contiguous_of<T>()) {
      for (int64_t begin = 0; begin < count(); begin += size) {
        f(rows_.const_data_ptr<T>() + begin * dim(), std::min(size, count() - begin));
      }
      return;
    }
    std::vector<T> chunk(std::min(size, count()) * dim());
    for (int64_t begin = 0; begin < count(); begin += size) {
      const int64_t end = std::min(begin + size, count());
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows_.scalar_type(), "rows",
                                      [&] { load<scalar_t>(begin, end, chunk.data()); });
      f(chunk.data(), end - begin);
    }
  }

 private:
  template <class T>
  bool is_contiguous_of() const {
    return rows_.scalar_type() == c10::CppTypeToScalarType<T>::value && rows_.is_contiguous() &&
           !ones_column_ && shared_ == Shared::kExpand;
  }

  // Rows a chunk: at most 1 MiB, and few enough that sums over a chunk, then over chunks, round
  // little. Dense factors take enough rows to apply K to U = X^T X instead of to X.
  int64_t chunk_size(const Layout& layout) const {
    if (layout.family == Family::kDense) return std::max<int64_t>(512, 8 * dim());
    return std::clamp<int64_t>((int64_t{1} << 18) / dim(), 64, 512);
  }

  template <class Source, class T>
  void load(int64_t begin, int64_t end, T* chunk) const {
    const int64_t d = dim(), features = rows_.size(2), shared = rows_.size(1);
    const int64_t uses = shared_ == Shared::kExpand ? 1 : shared;
    const T scale = shared_ == Shared::kMean ? T(1) / static_cast<T>(shared) : T(1);
    for (int64_t r = begin; r < end; ++r) {
      T* to = chunk + (r - begin) * d;
      const Source* from = rows_.const_data_ptr<Source>();
      from += uses == 1 && shared_ == Shared::kExpand
                  ? r / shared * rows_.stride(0) + r % shared * rows_.stride(1)
                  : r * rows_.stride(0);
      std::fill(to, to + d, T(0));
      for (int64_t s = 0; s < uses; ++s) {
        add_row(from + s * rows_.stride(1), rows_.stride(2), features, to);
      }
      for (int64_t j = 0; j < features && scale != T(1); ++j) to[j] *= scale;
      if (ones_column_) to[features] = shared_ == Shared::kSum ? static_cast<T>(shared) : T(1);
    }
  }

  template <class Source, class T>
  static void add_row(const Source* from, int64_t stride, int64_t features, T* to) {
    if (stride == 1) {
      for (int64_t j = 0; j < features; ++j) to[j] += static_cast<T>(from[j]);
    } else {
      for (int64_t j = 0; j < features; ++j) to[j] += static_cast<T>(from[j * stride]);
    }
  }

  at::Tensor rows_;
  bool ones_column_;
  Shared shared_;
};

}  // namespace singd::cpu
