// What the step needs of every factor (preconditioned_update.h): delta [dim], N [width, dim], and
// the largest row and column sums of |K|.
//
//   diagonal          delta = k^2
//   blocks            delta = 0;  N[t, j] = A[start(j) + t, j], A = K K^T
//   row-bordered      delta = D^2 on I;  N[:, I] = R[B, I] D,  N[:, B] = R[B, :] R[B, :]^T
//   column-bordered   delta = D^2 on I, 0 on B;  N = E, the stored border
//
// Factors are small, (width + 1) dim numbers, and read from L2 where they are read again. A thread
// owns an index of a diagonal or bordered factor: its column of the border, entry by entry. For
// diagonal blocks, a block of the grid holds about 256 columns of them in shared memory. A warp
// owns a row sum of the border. A block owns 16 x 16 entries of N[:, B], whose sums over dim its
// warps share.
#include "../structures/pattern.h"
#include "step.cuh"

namespace singd::cuda {
namespace {

constexpr int kWarps = kStepThreads / kWarp;
constexpr int kTile = 4;   // entries of a thread in one direction, of diagonal blocks
constexpr int kBatch = 8;  // loads of a thread that are under way together
constexpr int kStageElements = kMaxSideWidth * (kMaxSideWidth + 1);
// Of N[:, B], whose border rows are staged in chunks, in pairs of columns.
constexpr int kCoreTile = 16;
constexpr int kCoreColumns = 128;
constexpr int kCorePitch = kCoreColumns + 2;
static_assert(2 * kCoreTile * kCorePitch <= kStageElements);
static_assert(kWarps * kCoreTile * kCoreTile <= kStageElements);
static_assert(kCoreTile * kCoreTile == kStepThreads);

// Diagonal blocks that a block of the grid holds in shared memory, with rows of odd length.
SINGD_HOST_DEVICE inline int staged_pitch(int width) { return width | 1; }
SINGD_HOST_DEVICE inline int staged_columns(int width) {
  const int fitting = kStageElements / (width * staged_pitch(width));
  const int wanted = kStepThreads / width;
  return (fitting < wanted ? fitting : wanted) * width;
}

// How many blocks of the grid do what for a factor.
struct PrepareBlocks {
  int staged = 0, cores = 0, rows = 0, indices = 0;

  SINGD_HOST_DEVICE explicit PrepareBlocks(const StepFactor& f) {
    const auto blocks = [](int items, int of_a_block) {
      return (items + of_a_block - 1) / of_a_block;
    };
    const int width = f.shape.width;
    if (f.shape.action == Action::kBlocks) {
      staged = blocks(f.dim, staged_columns(width));
      return;
    }
    const int tiles = blocks(width, kCoreTile);
    if (f.shape.action == Action::kRowBordered) cores = tiles * (tiles + 1) / 2;
    rows = blocks(width, kWarps);
    indices = blocks(f.dim, kStepThreads);
  }

  SINGD_HOST_DEVICE int total() const { return staged + cores + rows + indices; }
};

template <class T>
__device__ __forceinline__ T absolute(T x) {
  return x < T(0) ? -x : x;
}

// Reads the storage of a factor.
template <class T_, class Stored>
struct FactorView {
  using T = T_;
  const StepFactor& f;

  __device__ __forceinline__ T at(int64_t slot) const {
    return widen<T>(load(static_cast<const Stored*>(f.factor) + slot));
  }
  // Bordered: row r of the border, and the interior.
  __device__ __forceinline__ T border(int r, int j) const { return at(int64_t{r} * f.dim + j); }
  __device__ T diagonal(int j) const {
    return at(int64_t{f.shape.width} * f.dim + j - f.shape.head);
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

// delta[j], column j of a bordered factor's N unless blocks sum it, and the sums of row and column
// j; the sums of border rows come elsewhere.
template <class View>
__device__ __forceinline__ Sums prepare_index(const View& view, int j, typename View::T* delta,
                                              typename View::T* n_of_factor) {
  using T = typename View::T;
  const StepFactor& f = view.f;
  if (f.shape.action == Action::kDiagonal) {
    const T k = f.factor == nullptr ? T(1) : view.at(j);
    store(delta + j, k * k);
    return {magnitude(k), magnitude(k)};
  }
  const bool is_border = f.shape.is_border(j, f.dim);
  const T diagonal = is_border ? T(0) : view.diagonal(j);
  const T factor = f.shape.action == Action::kColumnBordered ? T(1) : diagonal;
  const bool stores = f.shape.action == Action::kColumnBordered || !is_border;
  const int64_t pitch = padded(f.dim);
  T column = absolute(diagonal);
  for (int first = 0; first < f.shape.width; first += kBatch) {
    T batch[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      batch[n] = view.border(min(first + n, f.shape.width - 1), j);
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (first + n >= f.shape.width) break;
      column += absolute(batch[n]);
      if (stores) store(n_of_factor + (first + n) * pitch + j, batch[n] * factor);
    }
  }
  store(delta + j, diagonal * diagonal);
  return {magnitude(diagonal), magnitude(column)};
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

template <class View>
__device__ __forceinline__ void prepare_row_sum(const View& view, int r, int* row_sum) {
  if (r >= view.f.shape.width) return;
  const int lane = threadIdx.x % kWarp;
  typename View::T sum = 0;
  for (int first = lane; first < view.f.dim; first += kBatch * kWarp) {
    typename View::T batch[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      batch[n] = view.border(r, min(first + n * kWarp, view.f.dim - 1));
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (first + n * kWarp < view.f.dim) sum += absolute(batch[n]);
    }
  }
  sum = sum_of_warp(sum);
  if (lane == 0) atomicMax(row_sum, magnitude(sum));
}

// What a thread brings of 16 rows of the border, in the columns of a chunk: 0 beyond the border.
// All loads come first, so that they are under way together.
template <class View>
struct CoreShare {
  using T = typename View::T;
  static constexpr int kRows = kStepThreads / kCoreColumns;
  T values[kCoreTile / kRows];

  static __device__ int column() { return threadIdx.x % kCoreColumns; }
  static __device__ int row(int n) { return threadIdx.x / kCoreColumns + n * kRows; }

  __device__ __forceinline__ void load_from(const View& view, int first, int chunk) {
    const int last = view.f.shape.width - 1, j = min(chunk + column(), view.f.dim - 1);
#pragma unroll
    for (int n = 0; n < kCoreTile / kRows; ++n) {
      values[n] = view.border(min(first + row(n), last), j);
    }
  }
  __device__ __forceinline__ void stage(const View& view, int first, int chunk, T* shared) const {
#pragma unroll
    for (int n = 0; n < kCoreTile / kRows; ++n) {
      const bool inside = first + row(n) < view.f.shape.width && chunk + column() < view.f.dim;
      shared_store(shared + row(n) * kCorePitch + column(), inside ? values[n] : T(0));
    }
  }
};

// Entries (r ..., q ...) and (q ..., r ...) of R[B, :] R[B, :]^T. A warp takes an eighth of every
// chunk, a lane 4 x 2 sums of it. What a chunk adds is summed by itself: beside a large square,
// each of many small terms would round.
template <class View>
__device__ __forceinline__ void prepare_core(const View& view, int r, int q,
                                             typename View::T* shared, typename View::T* n) {
  using T = typename View::T;
  using Pair = Vec<T, 2>;
  constexpr int kDepth = kCoreColumns / kWarps, kX = 4, kY = 2;
  const StepFactor& f = view.f;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = lane / (kCoreTile / kY) * kX, column = lane % (kCoreTile / kY) * kY;
  const T* const x = shared + row * kCorePitch + warp * kDepth;
  const T* const y = shared + (kCoreTile + column) * kCorePitch + warp * kDepth;
  T sums[kX][kY] = {};
  for (int chunk = 0; chunk < f.dim; chunk += kCoreColumns) {
    CoreShare<View> xs, ys;
    xs.load_from(view, r, chunk);
    ys.load_from(view, q, chunk);
    xs.stage(view, r, chunk, shared);
    ys.stage(view, q, chunk, shared + kCoreTile * kCorePitch);
    __syncthreads();
    T parts[kX][kY] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 2) {
      Pair left[kX], right[kY];
#pragma unroll
      for (int a = 0; a < kX; ++a) {
        left[a] = shared_load(reinterpret_cast<const Pair*>(x + a * kCorePitch + k));
      }
#pragma unroll
      for (int b = 0; b < kY; ++b) {
        right[b] = shared_load(reinterpret_cast<const Pair*>(y + b * kCorePitch + k));
      }
#pragma unroll
      for (int a = 0; a < kX; ++a) {
#pragma unroll
        for (int b = 0; b < kY; ++b) {
          parts[a][b] += left[a][0] * right[b][0];
          parts[a][b] += left[a][1] * right[b][1];
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kX; ++a) {
#pragma unroll
      for (int b = 0; b < kY; ++b) sums[a][b] += parts[a][b];
    }
    __syncthreads();
  }
#pragma unroll
  for (int a = 0; a < kX; ++a) {
#pragma unroll
    for (int b = 0; b < kY; ++b) {
      shared_store(shared + (warp * kCoreTile + row + a) * kCoreTile + column + b, sums[a][b]);
    }
  }
  __syncthreads();
  T sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    sum += shared_load(shared + w * kCoreTile * kCoreTile + threadIdx.x);
  }
  const int i = r + threadIdx.x / kCoreTile, j = q + threadIdx.x % kCoreTile;
  if (i >= f.shape.width || j >= f.shape.width) return;
  store(n + i * padded(f.dim) + f.shape.border_index(j, f.dim), sum);
  if (r != q) store(n + j * padded(f.dim) + f.shape.border_index(i, f.dim), sum);
}

// Tile number `number` of those on and above the diagonal of N[:, B].
template <class View>
__device__ __forceinline__ void prepare_core_tile(const View& view, int number,
                                                  typename View::T* shared, typename View::T* n) {
  int across = 0;
  while (number > across) number -= ++across;
  prepare_core(view, number * kCoreTile, across * kCoreTile, shared, n);
}

// The diagonal blocks in columns `first` ...: their delta, N and sums.
template <class View>
__device__ __forceinline__ void prepare_staged(const View& view, int64_t first, typename View::T* k,
                                               typename View::T* delta, typename View::T* n,
                                               int* row_sum, int* column_sum) {
  using T = typename View::T;
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

// Block `block` of a factor's.
template <class View>
__device__ __forceinline__ void prepare(const View& view, int block, typename View::T* shared,
                                        int* counters) {
  const StepFactor& f = view.f;
  const PrepareBlocks blocks(f);
  auto* const delta = static_cast<typename View::T*>(f.delta);
  auto* const n = delta + padded(f.dim);
  int* const row_sum = counters + (f.is_left ? kLeftRowSum : kRightRowSum);
  int* const column_sum = counters + (f.is_left ? kLeftColumnSum : kRightColumnSum);
  if (block < blocks.staged) {
    const int64_t first = int64_t{block} * staged_columns(f.shape.width);
    return prepare_staged(view, first, shared, delta, n, row_sum, column_sum);
  }
  if (block < blocks.cores) return prepare_core_tile(view, block, shared, n);
  block -= blocks.cores;
  if (block < blocks.rows) {
    return prepare_row_sum(view, block * kWarps + static_cast<int>(threadIdx.x / kWarp), row_sum);
  }
  const int j = (block - blocks.rows) * kStepThreads + static_cast<int>(threadIdx.x);
  const Sums sums = j < f.dim ? prepare_index(view, j, delta, n) : Sums{};
  raise(row_sum, sums.row);
  raise(column_sum, sums.column);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, kResidentBlocks<T>)
    prepare_step_kernel(const __grid_constant__ FactorTable table, int* all_counters) {
  __shared__ Vec<T, 2> pairs[kStageElements / 2];
  T* const shared = &pairs[0][0];
  const StepFactor& f = table.find(blockIdx.x);
  const int block = static_cast<int>(blockIdx.x - f.first_block);
  int* const counters = all_counters + static_cast<int64_t>(kCounters) * f.slot;
  switch (static_cast<Dtype>(f.dtype)) {
    case Dtype::kFloat64:
      return prepare(FactorView<T, double>{f}, block, shared, counters);
    case Dtype::kFloat32:
      return prepare(FactorView<T, float>{f}, block, shared, counters);
    case Dtype::kBFloat16:
      return prepare(FactorView<T, bfloat16>{f}, block, shared, counters);
    default:
      return prepare(FactorView<T, float16>{f}, block, shared, counters);
  }
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
  const int64_t total = fill(table, factors, count,
                             [](const StepFactor& f) { return int64_t{PrepareBlocks(f).total()}; });
  const Launch where{"prepare_step", total, kStepThreads, stream};
  if (compute == Dtype::kFloat64) {
    launch(where, prepare_step_kernel<double>, table, counters);
  } else {
    launch(where, prepare_step_kernel<float>, table, counters);
  }
}

}  // namespace singd::cuda
