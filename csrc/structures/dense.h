// Dense, lower- and upper-triangular factors: a d x d row-major array, zero outside the triangle.
// The statistic is H = K^T U K itself (d x d): K has to be applied first when rows are few.
#pragma once

#include "entrywise.h"

namespace singd {

struct Dense : Entrywise<Dense> {
  Layout layout;

  explicit Dense(const Layout& l) : layout(l) {}

  int64_t size() const { return layout.dim * layout.dim; }

  std::vector<Section> sections() const { return {{"dense", 0, {layout.dim, layout.dim}}}; }

  template <class Function>
  void for_each_entry(Function f) const {
    const int64_t d = layout.dim;
    const int off_diagonal_weight = layout.triangle == Triangle::kFull ? 1 : 2;
    for (int64_t i = 0; i < d; ++i) {
      const int64_t begin = layout.triangle == Triangle::kUpper ? i : 0;
      const int64_t end = layout.triangle == Triangle::kLower ? i + 1 : d;
      for (int64_t j = begin; j < end; ++j) f(i * d + j, i, j, i == j ? 1 : off_diagonal_weight);
    }
  }

  template <class Math, class T>
  void accumulate(const T* k, const T* rows, int64_t m, T* statistic) const {
    const int64_t d = layout.dim;
    const MatrixView<const T> x{rows, d}, factor{k, d};
    const MatrixView<T> h{statistic, d};
    if (k == nullptr) return Math::multiply_symmetric(d, m, x, x, h, true);
    std::vector<T> scratch((m > 2 * d ? 2 * d : m) * d);
    if (m > 2 * d) {  // U = X^T X first: m d^2 + 2 d^3 products
      const MatrixView<T> u{scratch.data(), d}, uk{scratch.data() + d * d, d};
      Math::multiply_symmetric(d, m, x, x, u, false);
      Math::multiply(d, d, d, u, factor, uk);
      Math::multiply_symmetric(d, d, factor, uk, h, true);
    } else {  // Y = X K first: 2 m d^2 products
      const MatrixView<T> y{scratch.data(), d};
      Math::multiply(m, d, d, x, factor, y);
      Math::multiply_symmetric(d, m, MatrixView<const T>{scratch.data(), d}, y, h, true);
    }
  }

  template <class Math, class T>
  void conjugate(const T* /*k*/, const T* statistic, T* h) const {
    weigh<Math>(statistic, h);
  }

  template <class Math, class T>
  void gram(const T* k, T* h) const {
    const int64_t d = layout.dim;
    const MatrixView<const T> factor{k, d};
    Math::multiply_symmetric(d, d, factor, factor, MatrixView<T>{h, d}, false);
    if (layout.triangle != Triangle::kFull) weigh<Math>(h, h);
  }

  template <class Math, class T>
  void product(const T* a, const T* b, T* c) const {
    const int64_t d = layout.dim;
    Math::multiply(d, d, d, MatrixView<const T>{a, d}, MatrixView<const T>{b, d},
                   MatrixView<T>{c, d});
    clear_other_triangle<Math>(c);
  }

  template <class Math, class T>
  void multiply(const T* k, Side side, bool transpose, const T* x, T* y, int64_t other) const {
    const int64_t d = layout.dim;
    const auto factor = MatrixView<const T>{k, d}.transpose_if(transpose);
    if (side == Side::kLeft) {
      Math::multiply(d, other, d, factor, MatrixView<const T>{x, other}, MatrixView<T>{y, other});
    } else {
      Math::multiply(other, d, d, MatrixView<const T>{x, d}, factor, MatrixView<T>{y, d});
    }
  }

  // Without a visit of every entry.
  template <class Function>
  void for_each_diagonal(Function f) const {
    for (int64_t i = 0; i < layout.dim; ++i) f(i * (layout.dim + 1));
  }

 private:
  // h = Pi(S).
  template <class Math, class T>
  void weigh(const T* symmetric, T* h) const {
    const int64_t d = layout.dim;
    const T weight = layout.triangle == Triangle::kFull ? T(1) : T(2);
    Math::parallel_for(d, d, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T diagonal = symmetric[i * d + i];
        for (int64_t j = 0; j < d; ++j) h[i * d + j] = weight * symmetric[i * d + j];
        h[i * d + i] = diagonal;
      }
    });
    clear_other_triangle<Math>(h);
  }

  template <class Math, class T>
  void clear_other_triangle(T* k) const {
    if (layout.triangle == Triangle::kFull) return;
    const int64_t d = layout.dim;
    const bool is_lower = layout.triangle == Triangle::kLower;
    Math::parallel_for(d, d, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = k + i * d;
        is_lower ? std::fill(row + i + 1, row + d, T(0)) : std::fill(row, row + i, T(0));
      }
    });
  }
};

}  // namespace singd
