// Diagonal factors: d numbers. The statistic is diag(U), the column sums of squares of X.
#pragma once

#include "entrywise.h"

namespace singd {

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
