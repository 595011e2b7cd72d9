// What follows for every family from its list of entries alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "layout.h"
#include "matrix_view.h"
#include "spec.h"

namespace singd {

template <class Derived>
struct Entrywise {
  // h = Pi(S) for a dense symmetric S.
  template <class T>
  void project(const T* dense, T* h) const {
    const int64_t d = self().layout.dim;
    self().for_each_entry([&](int64_t slot, int64_t i, int64_t j, int weight) {
      h[slot] = static_cast<T>(weight) * dense[i * d + j];
    });
  }

  // h <- the entries of Pi, given the unweighted entries.
  template <class T>
  void apply_weights(T* h) const {
    self().for_each_entry(
        [&](int64_t slot, int64_t, int64_t, int weight) { h[slot] *= static_cast<T>(weight); });
  }

  // f(slot) for every diagonal entry.
  template <class Function>
  void for_each_diagonal(Function f) const {
    self().for_each_entry([&](int64_t slot, int64_t i, int64_t j, int) {
      if (i == j) f(slot);
    });
  }

  template <class T>
  T trace(const T* k) const {
    T sum = 0;
    for_each_diagonal([&](int64_t slot) { sum += k[slot]; });
    return sum;
  }

  template <class T>
  void add_to_diagonal(T* k, T value) const {
    for_each_diagonal([&](int64_t slot) { k[slot] += value; });
  }

  // An upper bound of the spectral norm: min(Frobenius, sqrt(1-norm * infinity-norm)).
  template <class T>
  double norm_bound(const T* k) const {
    const size_t d = static_cast<size_t>(self().layout.dim);
    std::vector<double> row_sum(d, 0.0), column_sum(d, 0.0);
    double squares = 0;
    self().for_each_entry([&](int64_t slot, int64_t i, int64_t j, int) {
      const double magnitude = std::abs(static_cast<double>(k[slot]));
      row_sum[i] += magnitude;
      column_sum[j] += magnitude;
      squares += magnitude * magnitude;
    });
    const double rows = *std::max_element(row_sum.begin(), row_sum.end());
    const double columns = *std::max_element(column_sum.begin(), column_sum.end());
    return std::min(std::sqrt(squares), std::sqrt(rows * columns));
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

}  // namespace singd
