// Diagonal factors: d numbers. The statistic is diag(U), the column sums of squares of X.
#pragma once

#include "entrywise.h"

namespace singd {

// sums[j] += sum over the m rows of X[:, j]^2; X has the given row stride. Rows are summed in tiles
// first, so that rounding errors grow with the tile and the number of tiles, not with m.
template <class T>
void add_column_squares(const T* x, int64_t row_stride, int64_t m, int64_t columns, T* sums) {
  constexpr int64_t kTile = 128;
  std::vector<T> partial(columns);
  for (int64_t start = 0; start < m; start += kTile) {
    std::fill(partial.begin(), partial.end(), T(0));
    for (int64_t r = start; r < std::min(m, start + kTile); ++r) {
      const T* row = x + r * row_stride;
      for (int64_t j = 0; j < columns; ++j) partial[j] += row[j] * row[j];
    }
    for (int64_t j = 0; j < columns; ++j) sums[j] += partial[j];
  }
}

// y = diag(k) x for `side` left (x has one row per entry of k), y = x diag(k) for right. Both x and
// y have the given row stride; `other` is the length of the other dimension.
template <class Math, class T>
void scale_by_diagonal(const T* k, int64_t dim, Side side, const T* x, T* y, int64_t row_stride,
                       int64_t other) {
  const int64_t rows = side == Side::kLeft ? dim : other;
  const int64_t columns = side == Side::kLeft ? other : dim;
  Math::parallel_for(rows, columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* from = x + i * row_stride;
      T* to = y + i * row_stride;
      if (side == Side::kLeft) {
        for (int64_t j = 0; j < columns; ++j) to[j] = k[i] * from[j];
      } else {
        for (int64_t j = 0; j < columns; ++j) to[j] = k[j] * from[j];
      }
    }
  });
}

struct Diagonal : Entrywise<Diagonal> {
  Layout layout;

  explicit Diagonal(const Layout& l) : layout(l) {}

  int64_t size() const { return layout.dim; }

  std::vector<Section> sections() const { return {{"diagonal", 0, {layout.dim}}}; }

  template <class Function>
  void for_each_entry(Function f) const {
    for (int64_t i = 0; i < layout.dim; ++i) f(i, i, i, 1);
  }

  template <class Math, class T>
  void accumulate(const T* /*k*/, const T* rows, int64_t m, T* statistic) const {
    add_column_squares(rows, layout.dim, m, layout.dim, statistic);
  }

  template <class Math, class T>
  void conjugate(const T* k, const T* statistic, T* h) const {
    for (int64_t j = 0; j < layout.dim; ++j) h[j] = k[j] * statistic[j] * k[j];
  }

  template <class Math, class T>
  void gram(const T* k, T* h) const {
    for (int64_t j = 0; j < layout.dim; ++j) h[j] = k[j] * k[j];
  }

  template <class Math, class T>
  void product(const T* a, const T* b, T* c) const {
    for (int64_t j = 0; j < layout.dim; ++j) c[j] = a[j] * b[j];
  }

  template <class Math, class T>
  void multiply(const T* k, Side side, bool /*transpose*/, const T* x, T* y, int64_t other) const {
    scale_by_diagonal<Math>(k, layout.dim, side, x, y, side == Side::kLeft ? other : layout.dim,
                            other);
  }
};

}  // namespace singd
