// Triangular Toeplitz factors: d numbers a. Upper: K[i, i + l] = a[l]; lower factors store their
// transpose. The statistic is the sum over every diagonal l of H = K^T U K, which is the
// autocorrelation of the rows of Y = X K; Pi averages it: h[l] = (1 or 2) statistic[l] / (d - l).
//
// Up to Math::kDirectToeplitz the products use a dense d x d copy of K, above it what Math has: the
// FFT, or panels of K.
#pragma once

#include <cmath>

#include "entrywise.h"

namespace singd {

// The least length >= 2 dim - 1 without prime factors beyond 5: circular convolutions of this
// length do not wrap around, and the FFT is fast.
inline int64_t fft_length(int64_t dim) {
  for (int64_t n = 2 * dim - 1;; ++n) {
    int64_t rest = n;
    for (const int64_t prime : {2, 3, 5}) {
      while (rest % prime == 0) rest /= prime;
    }
    if (rest == 1) return n;
  }
}

struct Toeplitz {
  Layout layout;

  explicit Toeplitz(const Layout& l) : layout(l) {}

  int64_t size() const { return layout.dim; }

  std::vector<Section> sections() const { return {{"coefficients", 0, {layout.dim}}}; }

  // Every slot is visited once per entry of its diagonal.
  template <class Function>
  void for_each_entry(Function f) const {
    for (int64_t l = 0; l < layout.dim; ++l) {
      for (int64_t i = 0; i + l < layout.dim; ++i) {
        layout.transposed ? f(l, i + l, i, weight(l)) : f(l, i, i + l, weight(l));
      }
    }
  }

  template <class T>
  void project(const T* dense, T* h) const {
    const int64_t d = layout.dim;
    for (int64_t l = 0; l < d; ++l) {
      double sum = 0;
      for (int64_t i = 0; i + l < d; ++i) sum += static_cast<double>(dense[i * d + i + l]);
      h[l] = static_cast<T>(average(sum, l));
    }
  }

  template <class Math, class T>
  void accumulate(const T* k, const T* rows, int64_t m, T* statistic) const {
    const int64_t d = layout.dim;
    std::vector<T> product(k == nullptr ? 0 : m * d), gram;
    if (k != nullptr) multiply<Math>(k, Side::kRight, false, rows, product.data(), m);
    const T* y = k == nullptr ? rows : product.data();
    if (d > Math::kDirectToeplitz) return Math::add_autocorrelation(y, m, d, statistic);
    gram.resize(d * d);
    const MatrixView<const T> view{y, d};
    Math::multiply(d, d, m, view.transpose(), view, MatrixView<T>{gram.data(), d});
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = i; j < d; ++j) statistic[j - i] += gram[i * d + j];
    }
  }

  template <class Math, class T>
  void conjugate(const T* /*k*/, const T* statistic, T* h) const {
    for (int64_t l = 0; l < layout.dim; ++l) {
      h[l] = static_cast<T>(average(static_cast<double>(statistic[l]), l));
    }
  }

  // The sum over diagonal l of K^T K is sum_t (d - l - t) a[t] a[t + l], for upper and for lower
  // factors: the correlation of a with a weighted a, in float64.
  template <class Math, class T>
  void gram(const T* k, T* h) const {
    const int64_t d = layout.dim;
    std::vector<double> a(k, k + d), weighted(d), sums(d);
    for (int64_t t = 0; t < d; ++t) weighted[t] = static_cast<double>(d - t) * a[t];
    correlate<Math>(a, weighted, sums);
    for (int64_t l = 0; l < d; ++l) h[l] = static_cast<T>(average(sums[l], l));
  }

  template <class Math, class T>
  void product(const T* a, const T* b, T* c) const {
    multiply_upper<Math>(b, Side::kRight, false, a, c, 1);
  }

  template <class Math, class T>
  void multiply(const T* k, Side side, bool transpose, const T* x, T* y, int64_t other) const {
    multiply_upper<Math>(k, side, transpose != layout.transposed, x, y, other);
  }

  // All diagonal entries share the first slot.
  template <class Function>
  void for_each_diagonal(Function f) const {
    f(0);
  }

  template <class T>
  double trace(const T* k) const {
    return static_cast<double>(layout.dim) * static_cast<double>(k[0]);
  }

  template <class T>
  void add_to_diagonal(T* k, T value) const {
    k[0] += value;
  }

 private:
  static int weight(int64_t l) { return l == 0 ? 1 : 2; }

  double average(double diagonal_sum, int64_t l) const {
    return weight(l) * diagonal_sum / static_cast<double>(layout.dim - l);
  }

  // out[l] = sum_t a[t] b[t + l].
  template <class Math>
  void correlate(const std::vector<double>& a, const std::vector<double>& b,
                 std::vector<double>& out) const {
    const int64_t d = layout.dim;
    if (d > Math::kDirectToeplitz) return Math::correlate(a.data(), b.data(), d, out.data());
    for (int64_t l = 0; l < d; ++l) {
      out[l] = 0;
      for (int64_t t = 0; t + l < d; ++t) out[l] += a[t] * b[t + l];
    }
  }

  // y = op(R) x or y = x op(R) for the upper Toeplitz R. x R and R^T x are causal convolutions with
  // a along the structured dimension, the other two are anticausal ones.
  template <class Math, class T>
  void multiply_upper(const T* a, Side side, bool transpose, const T* x, T* y,
                      int64_t other) const {
    const int64_t d = layout.dim;
    if (d > Math::kDirectToeplitz) {
      const bool causal = (side == Side::kRight) != transpose;
      return Math::convolve(a, d, side, causal, x, y, other);
    }
    std::vector<T> dense(d * d, T(0));
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = i; j < d; ++j) dense[i * d + j] = a[j - i];
    }
    const auto r = MatrixView<const T>{dense.data(), d}.transpose_if(transpose);
    if (side == Side::kLeft) {
      Math::multiply(d, other, d, r, MatrixView<const T>{x, other}, MatrixView<T>{y, other});
    } else {
      Math::multiply(other, d, d, MatrixView<const T>{x, d}, r, MatrixView<T>{y, d});
    }
  }
};

}  // namespace singd
