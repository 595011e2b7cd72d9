// Passes over the rows X [m, d] of a layer.
//
//   column_sums    segment sums of x or x^2: reads m d once. A block owns one segment and a panel
//                  of columns: 16 lanes of 16 bytes (256 bytes of a row) x 16 row lanes, each with
//                  4 loads in flight. Misaligned rows: 64 lanes of one element x 4 row lanes.
//                  Strided columns: a warp's lanes run along the rows of a column.
//   add_partials   reads the partial sums once, reads and writes the sums; the partial sums' lines
//                  of L2 are discarded then, so that DRAM need not see them
//   load_rows      reads the rows once, writes them in the compute type
//   weigh          reads and writes a storage once
#include "../structures/pattern.h"
#include "launch.cuh"
#include "row_kernels.h"
#include "rows.cuh"

namespace singd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kInFlight = 4;
constexpr int kStridedColumns = 16;  // of a block, where lanes run along rows

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The piece that a thread moves at a time, and the shape of a block whose lanes run along columns.
template <class T, RowAccess kAccess>
struct Shape {
  static constexpr int kPiece = kAccess == RowAccess::kVectors ? kVector<T> : 1;
  static constexpr int kLanes = kAccess == RowAccess::kVectors ? 16 : 64;
  static constexpr int kColumns = kLanes * kPiece;
  static constexpr int kRowLanes = kThreads / kLanes;
};

// The rows of the block's segment, and the number of its panel.
struct Portion {
  int64_t segment, panel, begin, end;

  __device__ Portion(const Rows& rows, const SegmentSums& sums, unsigned panels)
      : segment(blockIdx.x / panels), panel(blockIdx.x % panels) {
    begin = segment * sums.segment_rows;
    end = begin + sums.segment_rows < rows.count ? begin + sums.segment_rows : rows.count;
  }
};

template <ColumnSum kWhat, class A>
__device__ __forceinline__ A term(A x) {
  return kWhat == ColumnSum::kSquares ? x * x : x;
}

// Adds the terms of the piece of columns that starts at `column`, for the rows begin,
// begin + kStep, ... < end; kInFlight loads are on their way at a time.
template <ColumnSum kWhat, int kStep, class T, class A, int kPiece>
__device__ __forceinline__ void sum_pieces(const Rows& rows, int64_t begin, int64_t end,
                                           int64_t column, A (&sum)[kPiece]) {
  using V = Vec<T, kPiece>;
  const T* data = static_cast<const T*>(rows.data) + column * rows.column_stride;
  int64_t r = begin;
  for (; r + (kInFlight - 1) * kStep < end; r += kInFlight * kStep) {
    V v[kInFlight];
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
      const int64_t offset = rows.offset(r + n * kStep);
      v[n] = load<Cache::kStreaming>(reinterpret_cast<const V*>(data + offset));
    }
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
#pragma unroll
      for (int e = 0; e < kPiece; ++e) sum[e] += term<kWhat>(widen<A>(v[n][e]));
    }
  }
  for (; r < end; r += kStep) {
    const V v = load<Cache::kStreaming>(reinterpret_cast<const V*>(data + rows.offset(r)));
#pragma unroll
    for (int e = 0; e < kPiece; ++e) sum[e] += term<kWhat>(widen<A>(v[e]));
  }
}

template <class T, class A, ColumnSum kWhat, RowAccess kAccess>
__global__ __launch_bounds__(kThreads) void column_sums_kernel(Rows rows, SegmentSums sums,
                                                               unsigned panels) {
  using S = Shape<T, kAccess>;
  __shared__ A partial[S::kRowLanes][S::kColumns];
  const Portion portion(rows, sums, panels);
  const int lane = threadIdx.x % S::kLanes, row_lane = threadIdx.x / S::kLanes;
  const int64_t column = portion.panel * S::kColumns + lane * S::kPiece;

  A sum[S::kPiece];
#pragma unroll
  for (int e = 0; e < S::kPiece; ++e) sum[e] = A(0);
  if (column < rows.features) {
    sum_pieces<kWhat, S::kRowLanes, T>(rows, portion.begin + row_lane, portion.end, column, sum);
  }
#pragma unroll
  for (int e = 0; e < S::kPiece; ++e) partial[row_lane][lane * S::kPiece + e] = sum[e];
  __syncthreads();
  for (int c = threadIdx.x; c < S::kColumns; c += kThreads) {
    const int64_t j = portion.panel * S::kColumns + c;
    if (j >= rows.features) break;
    A total = A(0);
    for (int n = 0; n < S::kRowLanes; ++n) total += partial[n][c];
    store(static_cast<A*>(sums.out) + portion.segment * sums.out_stride + j,
          static_cast<A>(sums.scale) * total);
  }
}

template <class T, class A, ColumnSum kWhat>
__global__ __launch_bounds__(kThreads) void strided_column_sums_kernel(Rows rows, SegmentSums sums,
                                                                       unsigned panels) {
  const Portion portion(rows, sums, panels);
  const int lane = threadIdx.x % kWarp;
  for (int c = threadIdx.x / kWarp; c < kStridedColumns; c += kWarps) {
    const int64_t column = portion.panel * kStridedColumns + c;
    if (column >= rows.features) break;
    A sum[1] = {A(0)};
    sum_pieces<kWhat, kWarp, T>(rows, portion.begin + lane, portion.end, column, sum);
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], step);
    }
    if (lane == 0) {
      store(static_cast<A*>(sums.out) + portion.segment * sums.out_stride + column,
            static_cast<A>(sums.scale) * sum[0]);
    }
  }
}

// A warp owns whole lines of every split, which nothing reads afterwards.
template <class A>
__global__ __launch_bounds__(kThreads) void add_partials_kernel(A* partial, int64_t count,
                                                                int64_t stride, int64_t size,
                                                                A* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) {
    A sum = A(0);
#pragma unroll 8
    for (int64_t s = 0; s < count; ++s) sum += load(partial + s * stride + i);
    store(to + i, load(to + i) + sum);
  }
  __syncwarp();
  constexpr int kPerLine = static_cast<int>(kLineBytes / sizeof(A));
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = i - lane; first < i - lane + kWarp && first < size; first += kPerLine) {
#pragma unroll 1
    for (int64_t s = lane; s < count; s += kWarp) discard(partial + s * stride + first);
  }
}

// Vectors: a thread moves kVector<T> columns of one row; otherwise one element, along the rows
// for strided columns.
template <class T, RowAccess kAccess>
__global__ __launch_bounds__(kThreads) void load_rows_kernel(Rows rows, int64_t first_row,
                                                             int64_t count, int64_t width,
                                                             compute_t<T>* out) {
  using A = compute_t<T>;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if constexpr (kAccess == RowAccess::kVectors) {
    constexpr int kPart = kVector<A> < kVector<T> ? kVector<A> : kVector<T>;
    const int64_t pieces = width / kVector<T>, row = n / pieces;
    if (row >= count) return;
    const int64_t column = n % pieces * kVector<T>;
    const auto x = vector<T>(rows, rows.offset(first_row + row), column);
#pragma unroll
    for (int e = 0; e < kVector<T>; e += kPart) {
      Vec<A, kPart> part;
#pragma unroll
      for (int k = 0; k < kPart; ++k) part[k] = widen<A>(x[e + k]);
      store(reinterpret_cast<Vec<A, kPart>*>(out + row * width + column + e), part);
    }
  } else {
    const int64_t row = kAccess == RowAccess::kRows ? n % count : n / width;
    const int64_t column = kAccess == RowAccess::kRows ? n / count : n % width;
    if (row >= count || column >= width) return;
    store(out + row * width + column,
          widen<A>(element<T>(rows, rows.offset(first_row + row), column)));
  }
}

template <class A, class Pattern>
__global__ __launch_bounds__(kThreads) void weigh_kernel(Pattern pattern, A* h) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot >= pattern.size()) return;
  const Position p = pattern.position(slot);
  if (pattern.slot(p.row, p.column) < 0) {
    store(h + slot, A(0));
    return;
  }
  A value = load(h + slot) * static_cast<A>(pattern.weight(p.row, p.column));
  if constexpr (std::is_same_v<Pattern, ToeplitzPattern>) {
    value /= static_cast<A>(pattern.dim - slot);
  }
  store(h + slot, value);
}

template <class T, class A, ColumnSum kWhat>
void launch_column_sums(const Rows& rows, const SegmentSums& sums, Stream stream) {
  visit_access(rows.access, [&](auto access) {
    constexpr RowAccess kAccess = decltype(access)::value;
    const auto run = [&](auto kernel, int64_t columns) {
      const int64_t panels = divide_up(rows.features, columns);
      launch(Launch{"column_sums", panels * sums.segments, kThreads, stream}, kernel, rows, sums,
             static_cast<unsigned>(panels));
    };
    if constexpr (kAccess == RowAccess::kRows) {
      run(strided_column_sums_kernel<T, A, kWhat>, kStridedColumns);
    } else {
      run(column_sums_kernel<T, A, kWhat, kAccess>, Shape<T, kAccess>::kColumns);
    }
  });
}

}  // namespace

void column_sums(const Rows& rows, const SegmentSums& sums, Stream stream) {
  visit_type(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = compute_t<T>;
    if (sums.what == ColumnSum::kValues) {
      return launch_column_sums<T, A, ColumnSum::kValues>(rows, sums, stream);
    }
    if constexpr (std::is_same_v<T, float>) {
      if (sums.out_dtype == Dtype::kFloat64) {
        return launch_column_sums<T, double, ColumnSum::kSquares>(rows, sums, stream);
      }
    }
    launch_column_sums<T, A, ColumnSum::kSquares>(rows, sums, stream);
  });
}

void add_partials(void* partial, int64_t count, int64_t stride, int64_t size, void* to, Dtype dtype,
                  Stream stream) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    launch(Launch{"add_partials", divide_up(size, kThreads), kThreads, stream},
           add_partials_kernel<A>, static_cast<A*>(partial), count, stride, size,
           static_cast<A*>(to));
  };
  dtype == Dtype::kFloat64 ? run(double()) : run(float());
}

void load_rows(const Rows& rows, int64_t first_row, int64_t count, int64_t width, void* out,
               Stream stream) {
  visit_type(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    visit_access(rows.access, [&](auto access) {
      constexpr RowAccess kAccess = decltype(access)::value;
      const int64_t pieces = count * width / (kAccess == RowAccess::kVectors ? kVector<T> : 1);
      launch(Launch{"load_rows", divide_up(pieces, kThreads), kThreads, stream},
             load_rows_kernel<T, kAccess>, rows, first_row, count, width,
             static_cast<compute_t<T>*>(out));
    });
  });
}

void weigh(const Layout& layout, void* h, Dtype dtype, Stream stream) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    visit_pattern(layout, [&](const auto& pattern) {
      launch(Launch{"weigh", divide_up(pattern.size(), kThreads), kThreads, stream},
             weigh_kernel<A, std::decay_t<decltype(pattern)>>, pattern, static_cast<A*>(h));
    });
  };
  dtype == Dtype::kFloat64 ? run(double()) : run(float());
}

}  // namespace singd::cuda
