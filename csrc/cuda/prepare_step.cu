// What the step needs of every factor (preconditioned_update.h): delta [dim], N [width, dim], and
// the largest row and column sums of |K|.
//
//   diagonal          delta = k^2
//   blocks            delta = 0;  N[t, j] = A[start(j) + t, j], A = K K^T
//   row-bordered      delta = D^2 on I;  N[:, I] = R[B, I] D,  N[:, B] = R[B, :] R[B, :]^T
//   column-bordered   delta = D^2 on I, 0 on B;  N = E, the stored border
//
// Factors are small, (width + 1) dim numbers, and read from L2 where they are read again. A thread
// owns an index of the factor (delta, sums) or an entry of N. For diagonal blocks, a block of the
// grid holds about 256 columns of them in shared memory. A warp owns a sum over dim: a row sum of
// the border, or 4 x 4 entries of N[:, B].
#include "../structures/pattern.h"
#include "step.cuh"

namespace singd::cuda {
namespace {

constexpr int kWarps = kStepThreads / kWarp;
constexpr int kTile = 4;  // entries of a thread or warp in one direction
constexpr int kStageElements = kMaxSideWidth * (kMaxSideWidth + 1);

// Diagonal blocks that a block of the grid holds in shared memory, with rows of odd length.
SINGD_HOST_DEVICE inline int staged_pitch(int width) { return width | 1; }
SINGD_HOST_DEVICE inline int staged_columns(int width) {
  const int fitting = kStageElements / (width * staged_pitch(width));
  const int wanted = kStepThreads / width;
  return (fitting < wanted ? fitting : wanted) * width;
}

// How many blocks of the grid do what for a factor.
struct PrepareBlocks {
  int64_t staged = 0, indices = 0, entries = 0, sums = 0;

  SINGD_HOST_DEVICE explicit PrepareBlocks(const StepFactor& f) {
    const auto blocks = [](int64_t items, int64_t of_a_block) {
      return (items + of_a_block - 1) / of_a_block;
    };
    const int64_t width = f.shape.width;
    if (f.shape.action == Action::kBlocks) {
      staged = blocks(f.dim, staged_columns(f.shape.width));
      return;
    }
    indices = blocks(f.dim, kStepThreads);
    entries = blocks(width * f.dim, kStepThreads);
    sums = blocks(width + core_tiles(f.shape) * core_tiles(f.shape), kWarps);
  }

  SINGD_HOST_DEVICE static int64_t core_tiles(const SideShape& shape) {
    return shape.action == Action::kRowBordered ? (shape.width + kTile - 1) / kTile : 0;
  }
};

template <class T>
__device__ __forceinline__ T absolute(T x) {
  return x < T(0) ? -x : x;
}

// Reads the storage of a factor.
template <class T>
struct FactorView {
  const StepFactor& f;

  __device__ T at(int64_t slot) const {
    return load_as<T>(f.factor, static_cast<Dtype>(f.dtype), slot);
  }
  // Bordered: row r of the border, and the interior.
  __device__ T border(int64_t r, int64_t j) const { return at(r * f.dim + j); }
  __device__ T diagonal(int64_t j) const {
    return at(static_cast<int64_t>(f.shape.width) * f.dim + j - f.shape.head);
  }
  __device__ BlockPattern blocks() const {
    Layout layout;
    layout.family = Family::kBlockDiagonal;
    layout.dim = f.dim;
    layout.block = f.shape.width;
    return BlockPattern(layout);
  }
};

struct Sums {
  int row = 0, column = 0;  // magnitudes
};

// delta[j] and the sums of row and column j; a bordered factor's border rows come elsewhere.
template <class T>
__device__ Sums prepare_index(const FactorView<T>& view, int64_t j, T* delta) {
  const StepFactor& f = view.f;
  if (f.shape.action == Action::kDiagonal) {
    const T k = f.factor == nullptr ? T(1) : view.at(j);
    store(delta + j, k * k);
    return {magnitude(k), magnitude(k)};
  }
  const T diagonal = f.shape.is_border(j, f.dim) ? T(0) : view.diagonal(j);
  T column = absolute(diagonal);
  for (int r = 0; r < f.shape.width; ++r) column += absolute(view.border(r, j));
  store(delta + j, diagonal * diagonal);
  return {magnitude(diagonal), magnitude(column)};
}

// Entry (r, j) of a bordered factor's N, unless a warp sums it.
template <class T>
__device__ void prepare_entry(const FactorView<T>& view, int64_t r, int64_t j, T* n) {
  const StepFactor& f = view.f;
  T* const entry = n + r * padded(f.dim) + j;
  if (f.shape.action == Action::kColumnBordered) {
    store(entry, view.border(r, j));
  } else if (!f.shape.is_border(j, f.dim)) {
    store(entry, view.border(r, j) * view.diagonal(j));
  }
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

template <class T>
__device__ void prepare_row_sum(const FactorView<T>& view, int64_t r, int* row_sum) {
  const int lane = threadIdx.x % kWarp;
  T sum = 0;
  for (int64_t j = lane; j < view.f.dim; j += kWarp) sum += absolute(view.border(r, j));
  sum = sum_of_warp(sum);
  if (lane == 0) atomicMax(row_sum, magnitude(sum));
}

// Entries (r ..., q ...) and (q ..., r ...) of R[B, :] R[B, :]^T, for r <= q.
template <class T>
__device__ void prepare_core(const FactorView<T>& view, int64_t r, int64_t q, T* n) {
  const StepFactor& f = view.f;
  const int lane = threadIdx.x % kWarp;
  const int64_t last = f.shape.width - 1;
  T sums[kTile][kTile] = {};
  for (int64_t j = lane; j < f.dim; j += kWarp) {
    T x[kTile], y[kTile];
#pragma unroll
    for (int a = 0; a < kTile; ++a) {
      x[a] = view.border(min(r + a, last), j);
      y[a] = view.border(min(q + a, last), j);
    }
#pragma unroll
    for (int a = 0; a < kTile; ++a) {
#pragma unroll
      for (int b = 0; b < kTile; ++b) sums[a][b] += x[a] * y[b];
    }
  }
#pragma unroll
  for (int a = 0; a < kTile; ++a) {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
      const T sum = sum_of_warp(sums[a][b]);
      if (lane != 0 || r + a > last || q + b > last) continue;
      store(n + (r + a) * padded(f.dim) + f.shape.border_index(q + b, f.dim), sum);
      store(n + (q + b) * padded(f.dim) + f.shape.border_index(r + a, f.dim), sum);
    }
  }
}

// The warps' share of a bordered factor: row sums of the border, then tiles of N[:, B].
template <class T>
__device__ void prepare_sums(const FactorView<T>& view, int64_t number, T* n, int* row_sum) {
  const int64_t width = view.f.shape.width;
  if (number < width) return prepare_row_sum(view, number, row_sum);
  const int64_t across = PrepareBlocks::core_tiles(view.f.shape);
  number -= width;
  if (number >= across * across) return;
  const int64_t r = number / across * kTile, q = number % across * kTile;
  if (r <= q) prepare_core(view, r, q, n);
}

// The diagonal blocks in columns `first` ...: their delta, N and sums.
template <class T>
__device__ void prepare_staged(const FactorView<T>& view, int64_t first, T* delta, T* n,
                               int* row_sum, int* column_sum) {
  __shared__ T k[kStageElements];
  const StepFactor& f = view.f;
  const BlockPattern pattern = view.blocks();
  const int width = f.shape.width, pitch = staged_pitch(width);
  const int columns = static_cast<int>(min(int64_t{staged_columns(width)}, f.dim - first));
  const int rest = columns % width;
  const int elements = (columns - rest) * width + rest * rest;
  for (int at = threadIdx.x; at < elements; at += kStepThreads) {
    const int64_t slot = first * width + at;
    const Position p = pattern.position(slot);
    const int64_t inside = p.column - pattern.start(p.row);
    shared_store(k + (p.row - first) * pitch + inside, view.at(slot));
  }
  __syncthreads();
  const int tiles = (width + kTile - 1) / kTile;
  for (int at = threadIdx.x; at < tiles * columns; at += kStepThreads) {
    const int j = at % columns, t = at / columns * kTile, start = j / width * width;
    const int last = min(width, columns - start) - 1;
    T sums[kTile] = {};
    for (int u = 0; u <= last; ++u) {
      const T other = shared_load(k + j * pitch + u);
#pragma unroll
      for (int a = 0; a < kTile; ++a) {
        sums[a] += other * shared_load(k + (start + min(t + a, last)) * pitch + u);
      }
    }
#pragma unroll
    for (int a = 0; a < kTile; ++a) {
      if (t + a < width) {
        store(n + (t + a) * padded(f.dim) + first + j, t + a <= last ? sums[a] : T(0));
      }
    }
  }
  Sums largest;
  for (int j = threadIdx.x; j < columns; j += kStepThreads) {
    const int start = j / width * width, count = min(width, columns - start);
    T row = 0, column = 0;
    for (int u = 0; u < count; ++u) {
      row += absolute(shared_load(k + j * pitch + u));
      column += absolute(shared_load(k + (start + u) * pitch + j - start));
    }
    store(delta + first + j, T(0));
    largest = {magnitude(row), magnitude(column)};
  }
  raise(row_sum, largest.row);
  raise(column_sum, largest.column);
}

using FactorTable = Table<StepFactor, kMaxStepFactors>;

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    prepare_step_kernel(const __grid_constant__ FactorTable table, int* all_counters) {
  const StepFactor& f = table.find(blockIdx.x);
  const FactorView<T> view{f};
  const PrepareBlocks blocks(f);
  T* const delta = static_cast<T*>(f.delta);
  T* const n = delta + padded(f.dim);
  int* const counters = all_counters + static_cast<int64_t>(kCounters) * f.slot;
  int* const row_sum = counters + (f.is_left ? kLeftRowSum : kRightRowSum);
  int* const column_sum = counters + (f.is_left ? kLeftColumnSum : kRightColumnSum);
  int64_t block = blockIdx.x - f.first_block;
  if (block < blocks.staged) {
    const int64_t first = block * staged_columns(f.shape.width);
    return prepare_staged(view, first, delta, n, row_sum, column_sum);
  }
  if (block < blocks.indices) {
    const int64_t j = block * kStepThreads + threadIdx.x;
    const Sums sums = j < f.dim ? prepare_index(view, j, delta) : Sums{};
    raise(row_sum, sums.row);
    raise(column_sum, sums.column);
    return;
  }
  block -= blocks.indices;
  if (block < blocks.entries) {
    const int64_t entry = block * kStepThreads + threadIdx.x, r = entry / f.dim;
    if (r < f.shape.width) prepare_entry(view, r, entry % f.dim, n);
    return;
  }
  block -= blocks.entries;
  prepare_sums(view, block * kWarps + threadIdx.x / kWarp, n, row_sum);
}

__global__ void __launch_bounds__(kStepThreads)
    clear_counters_kernel(int* counters, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
  if (at < count) store(counters + at, 0);
}

}  // namespace

void clear_counters(int* counters, int64_t count, Stream stream) {
  launch({"clear_counters", (count + kStepThreads - 1) / kStepThreads, kStepThreads, stream},
         clear_counters_kernel, counters, count);
}

void prepare_step(StepFactor* factors, int count, Dtype compute, int* counters, Stream stream) {
  FactorTable table;
  const int64_t total = fill(table, factors, count, [](const StepFactor& f) {
    const PrepareBlocks blocks(f);
    return blocks.staged + blocks.indices + blocks.entries + blocks.sums;
  });
  const Launch where{"prepare_step", total, kStepThreads, stream};
  if (compute == Dtype::kFloat64) {
    launch(where, prepare_step_kernel<double>, table, counters);
  } else {
    launch(where, prepare_step_kernel<float>, table, counters);
  }
}

}  // namespace singd::cuda
