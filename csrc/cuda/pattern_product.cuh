// Products of structured matrices, one entry at a time, for kernels with one thread an entry:
//
//   V(i, j)    = sum over t in column(j) of U(i, t) K(t, j), U symmetric      symmetric_product
//   H(i, j)    = sum over s in column(i) of K(s, i) V(s, j)                   transposed_product
//   C(i, j)    = sum over t in row(i) and column(j) of A(i, t) B(t, j)        product
//
// Positions are those of the stored matrix R (csrc/structures/pattern.h). Where (i, j) is on the
// pattern, column(i) is part of column(j): structures are closed under products. A row or a column
// consists of at most three ranges of positions, and along a range slots are an affine function of
// the position, so that inner loops are strided dot products. Neighbouring threads have
// neighbouring j: one operand is the same for the warp, the other lies at neighbouring addresses.
#pragma once

#include "../structures/pattern.h"
#include "device.cuh"

namespace singd::cuda {

// Slots start, start + stride, ...
struct Line {
  int64_t start, stride;
};

// The slots of positions t, t + 1, ... of a range.
template <class SlotOf>
__device__ __forceinline__ Line line_from(int64_t t, SlotOf slot_of) {
  const int64_t start = slot_of(t);
  return {start, slot_of(t + 1) - start};
}

template <class T>
__device__ __forceinline__ T dot(const T* a, Line at, const T* b, Line bt, int64_t count) {
  T sum = 0;
#pragma unroll 4
  for (int64_t n = 0; n < count; ++n) {
    sum += load(a + at.start + n * at.stride) * load(b + bt.start + n * bt.stride);
  }
  return sum;
}

// f(first, count) for every range of rows in column j.
template <class Function>
__device__ __forceinline__ void for_each_range_of_column(const DensePattern& p, int64_t j,
                                                         Function f) {
  f(p.column_row(j, 0), p.column_length(j));
}
template <class Function>
__device__ __forceinline__ void for_each_range_of_column(const BorderedPattern& p, int64_t j,
                                                         Function f) {
  f(int64_t(0), p.head);
  if (j < p.head) return;
  f(p.dim - p.tail, p.tail);
  if (!p.is_border(j)) f(j, int64_t(1));
}

// f(first, count) for the range of columns in row i.
template <class Pattern, class Function>
__device__ __forceinline__ void for_each_range_of_row(const Pattern& p, int64_t i, Function f) {
  f(p.row_column(i, 0), p.row_length(i));
}

// f(first, count) for every range of t with (i, t) and (t, j) on the pattern, where (i, j) is.
template <class Function>
__device__ __forceinline__ void for_each_common_range(const DensePattern& p, int64_t i, int64_t j,
                                                      Function f) {
  const int64_t begin = p.triangle == Triangle::kUpper ? i : p.triangle == Triangle::kLower ? j : 0;
  const int64_t last = p.triangle == Triangle::kUpper   ? j
                       : p.triangle == Triangle::kLower ? i
                                                        : p.dim - 1;
  f(begin, last - begin + 1);
}
template <class Function>
__device__ __forceinline__ void for_each_common_range(const ToeplitzPattern&, int64_t i, int64_t j,
                                                      Function f) {
  f(i, j - i + 1);
}
template <class Function>
__device__ __forceinline__ void for_each_common_range(const BorderedPattern& p, int64_t i,
                                                      int64_t j, Function f) {
  if (!p.is_border(i)) return f(i, int64_t(1));
  if (i < p.head) f(int64_t(0), p.head);
  if (j < p.head) return;
  f(p.dim - p.tail, p.tail);
  if (!p.is_border(j)) f(j, int64_t(1));
}

template <class T, class Pattern>
__device__ T symmetric_product(const Pattern& p, const T* u, const T* k, int64_t i, int64_t j) {
  T sum = 0;
  for_each_range_of_column(p, j, [&](int64_t first, int64_t count) {
    const Line row = line_from(first, [&](int64_t t) {
      const int64_t slot = p.slot(i, t);
      return slot < 0 ? p.slot(t, i) : slot;
    });
    const Line column = line_from(first, [&](int64_t t) { return p.slot(t, j); });
    sum += dot(u, row, k, column, count);
  });
  return sum;
}

template <class T, class Pattern>
__device__ T transposed_product(const Pattern& p, const T* k, const T* v, int64_t i, int64_t j) {
  T sum = 0;
  for_each_range_of_column(p, i, [&](int64_t first, int64_t count) {
    const Line left = line_from(first, [&](int64_t s) { return p.slot(s, i); });
    const Line right = line_from(first, [&](int64_t s) { return p.slot(s, j); });
    sum += dot(k, left, v, right, count);
  });
  return sum;
}

template <class T, class Pattern>
__device__ T product(const Pattern& p, const T* a, const T* b, int64_t i, int64_t j) {
  T sum = 0;
  for_each_common_range(p, i, j, [&](int64_t first, int64_t count) {
    const Line row = line_from(first, [&](int64_t t) { return p.slot(i, t); });
    const Line column = line_from(first, [&](int64_t t) { return p.slot(t, j); });
    sum += dot(a, row, b, column, count);
  });
  return sum;
}

// Pi's mean over diagonal l of a d x d matrix, from its sum.
__device__ __forceinline__ double toeplitz_average(double sum, int64_t d, int64_t l) {
  return (l == 0 ? 1 : 2) * sum / static_cast<double>(d - l);
}

// Pi(K^T K) of a Toeplitz factor with coefficients a. The sum over diagonal l has no term that
// another one cancels: sum over t of (d - l - t) a[t] a[t + l].
template <class T>
__device__ double toeplitz_gram(const T* a, int64_t d, int64_t l) {
  double sum = 0;
#pragma unroll 4
  for (int64_t t = 0; t < d - l; ++t) {
    sum += static_cast<double>(d - l - t) *
           (static_cast<double>(load(a + t)) * static_cast<double>(load(a + t + l)));
  }
  return toeplitz_average(sum, d, l);
}

// A slot as an entry (i, j) of a pattern whose slot 0 is slot `base` of the storage: a diagonal
// block is a dense matrix of its own. Calls f(pattern, base, i, j), but not for slots that hold the
// zeros of a triangle or of a hierarchical factor's tail rows.
template <class Function>
__device__ __forceinline__ void with_entry(const Layout& layout, int64_t slot, Function&& f) {
  const auto visit = [&](const auto& pattern) {
    const Position at = pattern.position(slot);
    if (pattern.slot(at.row, at.column) >= 0) f(pattern, int64_t(0), at.row, at.column);
  };
  switch (layout.family) {
    case Family::kDiagonal:
    case Family::kBlockDiagonal: {
      const BlockPattern blocks(layout);
      const Position at = blocks.position(slot);
      const int64_t first = blocks.start(at.row);
      Layout block;
      block.dim = blocks.width(first);
      return f(DensePattern(block), first * blocks.block, at.row - first, at.column - first);
    }
    case Family::kBordered:
      return visit(BorderedPattern(layout));
    case Family::kToeplitz:
      return visit(ToeplitzPattern(layout));
    default:
      return visit(DensePattern(layout));
  }
}

// The product A B at a slot. A transposed layout stores (A B)^T = B^T A^T.
template <class T>
__device__ T product_at(const Layout& layout, const T* a, const T* b, int64_t slot) {
  const T* left = layout.transposed ? b : a;
  const T* right = layout.transposed ? a : b;
  T value = 0;
  with_entry(layout, slot, [&](const auto& pattern, int64_t base, int64_t i, int64_t j) {
    value = product(pattern, left + base, right + base, i, j);
  });
  return value;
}

// Column-bordered factors: K^T K = R R^T, whose core E E^T has sums over the whole width. A warp
// makes one entry of the core. Nothing for other layouts.
inline int64_t core_blocks(const Layout& layout, int threads) {
  const int64_t border = layout.head + layout.tail, warps = threads / kWarp;
  return layout.transposed ? (border * border + warps - 1) / warps : 0;
}

// Block `block` of core_blocks(): unweighted entries of Pi(K^T K), in the core of h.
template <class T>
__device__ void core_gram_of_block(const Layout& layout, int64_t block, const T* k, T* h) {
  const BorderedPattern p(layout);
  const int64_t lane = threadIdx.x % kWarp;
  const int64_t entry = block * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int64_t row = entry / p.border(), column = entry % p.border();
  if (row >= p.border()) return;
  T sum = 0;
#pragma unroll 4
  for (int64_t t = lane; t < p.dim; t += kWarp) {
    sum += load(k + row * p.dim + t) * load(k + column * p.dim + t);
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (lane == 0) store(h + row * p.dim + p.border_index(column), sum);
}

// Pi(K^T K) at an entry; the core of a column-bordered factor lies unweighted in `core`.
template <class T, class Pattern>
__device__ T gram(const Layout&, const Pattern& p, const T* k, const T*, int64_t i, int64_t j) {
  return static_cast<T>(p.weight(i, j)) * transposed_product(p, k, k, i, j);
}
template <class T>
__device__ T gram(const Layout& layout, const BorderedPattern& p, const T* k, const T* core,
                  int64_t i, int64_t j) {
  const T weight = static_cast<T>(p.weight(i, j));
  if (!layout.transposed) return weight * transposed_product(p, k, k, i, j);
  if (p.is_border(j)) return weight * load(core + p.slot(i, j));
  return weight * (load(k + p.slot(i, j)) * load(k + p.slot(j, j)));
}
template <class T>
__device__ T gram(const Layout&, const ToeplitzPattern& p, const T* k, const T*, int64_t,
                  int64_t j) {
  return static_cast<T>(toeplitz_gram(k, p.dim, j));
}

// Pi(K^T K) at a slot.
template <class T>
__device__ T gram_at(const Layout& layout, const T* k, const T* core, int64_t slot) {
  T value = 0;
  with_entry(layout, slot, [&](const auto& pattern, int64_t base, int64_t i, int64_t j) {
    value = gram(layout, pattern, k + base, core + base, i, j);
  });
  return value;
}

}  // namespace singd::cuda
