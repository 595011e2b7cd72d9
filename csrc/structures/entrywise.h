// What follows for every family from its list of entries alone.
#pragma once

#include <algorithm>
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

  // f(slot) for every diagonal entry.
  template <class Function>
  void for_each_diagonal(Function f) const {
    self().for_each_entry([&](int64_t slot, int64_t i, int64_t j, int) {
      if (i == j) f(slot);
    });
  }

  template <class T>
  double trace(const T* k) const {
    double sum = 0;
    self().for_each_diagonal([&](int64_t slot) { sum += static_cast<double>(k[slot]); });
    return sum;
  }

  template <class T>
  void add_to_diagonal(T* k, T value) const {
    self().for_each_diagonal([&](int64_t slot) { k[slot] += value; });
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

}  // namespace singd
