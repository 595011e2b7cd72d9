// What the step needs of every factor (preconditioned_update.h): delta [dim], N [width, dim], and
// the largest row and column sums of |K|.
//
//   diagonal          delta = k^2
//   blocks            N[t, j] = A[start(j) + t, j], A = K K^T
//   row-bordered      delta = D^2 on I;  N[:, I] = R[B, I] D,  N[:, B] = R[B, :] R[B, :]^T
//   column-bordered   delta = D^2 on I, 0 on B;  N = E, the stored border
//
// Factors are small: (width + 1) dim numbers. A thread owns an index of the factor (delta, sums) or
// an entry of N; a warp owns a sum of dim terms (row sums of the border, and N[:, B]).
#include "../structures/pattern.h"
#include "step.cuh"

namespace singd::cuda {
namespace {

constexpr int kWarps = kStepThreads / kWarp;

struct PrepareBlocks {
  int64_t indices, entries, sums;

  SINGD_HOST_DEVICE explicit PrepareBlocks(const StepFactor& f) {
    const int64_t width = f.shape.width;
    indices = (f.dim + kStepThreads - 1) / kStepThreads;
    entries = (width * f.dim + kStepThreads - 1) / kStepThreads;
    int64_t rows = 0;
    if (f.shape.action == Action::kRowBordered) rows = width + width * width;
    if (f.shape.action == Action::kColumnBordered) rows = width;
    sums = (rows + kWarps - 1) / kWarps;
  }
};

// Reads the storage of a factor.
template <class T>
struct FactorView {
  const StepFactor& f;
  BlockPattern blocks;

  __device__ explicit FactorView(const StepFactor& factor) : f(factor), blocks(layout(factor)) {}

  __device__ T at(int64_t slot) const {
    return load_as<T>(f.factor, static_cast<Dtype>(f.dtype), slot);
  }
  // Bordered: row r of the border, and the interior.
  __device__ T border(int64_t r, int64_t j) const { return at(r * f.dim + j); }
  __device__ T diagonal(int64_t j) const {
    return at(static_cast<int64_t>(f.shape.width) * f.dim + j - f.shape.head);
  }

 private:
  __device__ static Layout layout(const StepFactor& f) {
    Layout l;
    l.family = Family::kBlockDiagonal;
    l.dim = f.dim;
    l.block = f.shape.width < 1 ? 1 : f.shape.width;
    return l;
  }
};

template <class T>
__device__ __forceinline__ T absolute(T x) {
  return x < T(0) ? -x : x;
}

struct Sums {
  int row, column;  // magnitudes
};

// delta[j] and the sums of row and column j; a bordered factor's border rows come elsewhere.
template <class T>
__device__ Sums prepare_index(const FactorView<T>& view, int64_t j, T* delta) {
  const StepFactor& f = view.f;
  if (f.factor == nullptr) {
    store(delta + j, T(1));
    return {magnitude(T(1)), magnitude(T(1))};
  }
  if (f.shape.action == Action::kDiagonal) {
    const T k = view.at(j);
    store(delta + j, k * k);
    return {magnitude(k), magnitude(k)};
  }
  T row = 0, column = 0;
  if (f.shape.action == Action::kBlocks) {
    for (int64_t n = 0; n < view.blocks.row_length(j); ++n) {
      const int64_t other = view.blocks.row_column(j, n);
      row += absolute(view.at(view.blocks.slot(j, other)));
      column += absolute(view.at(view.blocks.slot(other, j)));
    }
    store(delta + j, T(0));
    return {magnitude(row), magnitude(column)};
  }
  const T diagonal = f.shape.is_border(j, f.dim) ? T(0) : view.diagonal(j);
  column = absolute(diagonal);
  for (int r = 0; r < f.shape.width; ++r) column += absolute(view.border(r, j));
  store(delta + j, diagonal * diagonal);
  return {magnitude(diagonal), magnitude(column)};
}

// Entry (r, j) of N, unless a warp sums it.
template <class T>
__device__ void prepare_entry(const FactorView<T>& view, int64_t r, int64_t j, T* n) {
  const StepFactor& f = view.f;
  if (f.shape.action == Action::kBlocks) {
    T sum = 0;
    if (r < view.blocks.width(j)) {
      const int64_t i = view.blocks.start(j) + r;
      for (int64_t t = 0; t < view.blocks.width(j); ++t) {
        const int64_t u = view.blocks.start(j) + t;
        sum += view.at(view.blocks.slot(i, u)) * view.at(view.blocks.slot(j, u));
      }
    }
    store(n, sum);
  } else if (f.shape.action == Action::kColumnBordered) {
    store(n, view.border(r, j));
  } else if (!f.shape.is_border(j, f.dim)) {
    store(n, view.border(r, j) * view.diagonal(j));
  }
}

// Row sum `number` of the border, or from `width` on, entry (r, q) of R[B, :] R[B, :]^T.
template <class T>
__device__ void prepare_sum(const FactorView<T>& view, int64_t number, T* n, int* row_sum) {
  const StepFactor& f = view.f;
  const int lane = threadIdx.x % kWarp, width = f.shape.width;
  const bool is_row_sum = number < width;
  const int64_t r = is_row_sum ? number : (number - width) / width;
  const int64_t q = is_row_sum ? 0 : (number - width) % width;
  T sum = 0;
  for (int64_t j = lane; j < f.dim; j += kWarp) {
    const T e = view.border(r, j);
    sum += is_row_sum ? absolute(e) : e * view.border(q, j);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffU, sum, offset);
  }
  if (lane != 0) return;
  if (is_row_sum) {
    atomicMax(row_sum, magnitude(sum));
  } else {
    store(n + r * padded(f.dim) + f.shape.border_index(q, f.dim), sum);
  }
}

using FactorTable = Table<StepFactor, kMaxStepFactors>;

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    prepare_step_kernel(const __grid_constant__ FactorTable table, int* all_counters) {
  const StepFactor& f = table.find(blockIdx.x);
  const FactorView<T> view(f);
  const PrepareBlocks blocks(f);
  T* const delta = static_cast<T*>(f.delta);
  T* const n = delta + padded(f.dim);
  int* const counters = all_counters + static_cast<int64_t>(kCounters) * f.slot;
  int* const row_sum = counters + (f.is_left ? kLeftRowSum : kRightRowSum);
  int* const column_sum = counters + (f.is_left ? kLeftColumnSum : kRightColumnSum);
  int64_t block = blockIdx.x - f.first_block;
  if (block < blocks.indices) {
    const int64_t j = block * kStepThreads + threadIdx.x;
    const Sums sums = j < f.dim ? prepare_index(view, j, delta) : Sums{0, 0};
    raise(row_sum, sums.row);
    raise(column_sum, sums.column);
    return;
  }
  block -= blocks.indices;
  if (block < blocks.entries) {
    const int64_t entry = block * kStepThreads + threadIdx.x;
    const int64_t r = entry / f.dim, j = entry % f.dim;
    if (r < f.shape.width) prepare_entry(view, r, j, n + r * padded(f.dim) + j);
    return;
  }
  block -= blocks.entries;
  const int64_t number = block * kWarps + threadIdx.x / kWarp, width = f.shape.width;
  const int64_t count = f.shape.action == Action::kRowBordered ? width + width * width : width;
  if (number < count) prepare_sum(view, number, n, row_sum);
}

}  // namespace

void prepare_step(StepFactor* factors, int count, Dtype compute, int* counters, Stream stream) {
  FactorTable table;
  const int64_t total = fill(table, factors, count, [](const StepFactor& f) {
    const PrepareBlocks blocks(f);
    return blocks.indices + blocks.entries + blocks.sums;
  });
  const Launch where{"prepare_step", total, kStepThreads, stream};
  if (compute == Dtype::kFloat64) {
    launch(where, prepare_step_kernel<double>, table, counters);
  } else {
    launch(where, prepare_step_kernel<float>, table, counters);
  }
}

}  // namespace singd::cuda
