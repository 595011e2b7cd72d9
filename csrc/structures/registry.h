// The list of families. What every family offers (T is float or double; `Math` supplies products,
// FFTs and threads, see csrc/cpu/math.h):
//
//   size(), sections()                      numbers stored, and their named parts
//   for_each_entry(f)                       f(slot, i, j, weight) for every entry K[i, j] that the
//                                           pattern allows; weight is that of the map Pi (Table 1)
//   project(S, h)                           h = Pi(S), S symmetric dense
//   accumulate<Math>(k, X, m, statistic)    dense and Toeplitz: adds the m rows of X to the
//                                           statistic of K; k may be null for K = I
//   conjugate<Math>(k, statistic, h)        h = Pi(K^T U K), U = X^T X of the accumulated rows
//   gram<Math>(k, h)                        h = Pi(K^T K)
//   product<Math>(a, b, c)                  c = A B, all of this structure
//   multiply<Math>(k, side, transpose, x, y, other)
//                                           y = op(K) x (x is dim x other) or y = x op(K)
//   for_each_diagonal(f), trace(k), add_to_diagonal(k, v)
#pragma once

#include <stdexcept>

#include "block_diagonal.h"
#include "bordered.h"
#include "dense.h"
#include "diagonal.h"
#include "toeplitz.h"

namespace singd {

template <class Function>
decltype(auto) visit(const Layout& layout, Function&& function) {
  switch (layout.family) {
    case Family::kDense:
      return function(Dense{layout});
    case Family::kDiagonal:
      return function(Diagonal{layout});
    case Family::kBlockDiagonal:
      return function(BlockDiagonal{layout});
    case Family::kBordered:
      return function(Bordered{layout});
    case Family::kToeplitz:
      return function(Toeplitz{layout});
  }
  throw std::logic_error("unknown structure family");
}

// The families whose products need the whole matrix.
template <class Function>
decltype(auto) visit_whole(const Layout& layout, Function&& function) {
  return layout.family == Family::kDense ? function(Dense{layout}) : function(Toeplitz{layout});
}

}  // namespace singd
