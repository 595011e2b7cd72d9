// The border columns of Y = X K for a column-bordered K with a narrow border: S = X E^T, S [m, b],
// E [b, d], b <= 4, for rows that can be read 16 bytes at a time.
//
// A block owns 16 rows, a warp two of them: its lanes run along the columns, four vectors of each
// row at a time, beside as many columns of E in shared memory. Lanes' sums meet at the end.
//
// Reads X once, E from L2 once per block, writes S.
#include "gram.h"
#include "launch.cuh"
#include "rows.cuh"

namespace singd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 2;  // of a warp
constexpr int kVectors = 4;
constexpr int kMaxWidth = 4;

struct Task {
  Rows x;
  const void* e;
  int64_t dim, border, first_row;
  void* out;
};

template <class T>
constexpr int kColumns = kWarp * kVectors * kVector<T>;

// Where column c of a step lies in shared memory: what a lane multiplies one vector of X with is
// loaded in pieces of 16 bytes, and those of neighbouring lanes lie side by side.
template <class T>
__device__ __forceinline__ int place(int c) {
  constexpr int kSize = kVector<T>, kPart = kVector<compute_t<T>>, kVectorColumns = kWarp * kSize;
  const int vector = c / kVectorColumns, lane = c % kVectorColumns / kSize;
  const int part = c % kSize / kPart;
  return vector * kVectorColumns + (part * kWarp + lane) * kPart + c % kPart;
}

// Columns first ... of E, zero beside E and for the column of ones. All loads are on their way
// before the first is stored: those of what does not exist read something else.
template <class T, int kBorder>
__device__ __forceinline__ void stage_border(const Task& task, int64_t first, compute_t<T>* stage) {
  using A = compute_t<T>;
  constexpr int kPieces = kBorder * kColumns<T> / kThreads;
  static_assert(kPieces * kThreads == kBorder * kColumns<T>, "threads share evenly");
  A values[kPieces];
#pragma unroll
  for (int q = 0; q < kPieces; ++q) {
    const int n = q * kThreads + threadIdx.x, row = n / kColumns<T>;
    const int64_t column = first + n % kColumns<T>;
    const bool exists = row < task.border && column < task.x.features;
    const A value =
        load(static_cast<const A*>(task.e) + (exists ? row * task.dim + column : int64_t{0}));
    values[q] = exists ? value : A(0);
  }
#pragma unroll
  for (int q = 0; q < kPieces; ++q) {
    const int n = q * kThreads + threadIdx.x, row = n / kColumns<T>;
    shared_store(stage + row * kColumns<T> + place<T>(n % kColumns<T>), values[q]);
  }
}

template <class T, int kBorder>
struct Sums {
  using A = compute_t<T>;
  using V = Vec<T, kVector<T>>;
  A sum[kRows][kBorder] = {};

  __device__ __forceinline__ void add(const V (&x)[kRows][kVectors], const A* stage) {
    constexpr int kPart = kVector<A>;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int first = 0; first < V::kSize; first += kPart) {
#pragma unroll
        for (int b = 0; b < kBorder; ++b) {
          const int column = (v * kWarp + lane) * V::kSize + first;
          const A* const from = stage + b * kColumns<T> + place<T>(column);
          const auto e = shared_load(reinterpret_cast<const Vec<A, kPart>*>(from));
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int k = 0; k < kPart; ++k) sum[i][b] += widen<A>(x[i][v][first + k]) * e[k];
          }
        }
      }
    }
  }

  // Every lane gets the sums over all lanes; entry (i, b) of them is returned.
  __device__ __forceinline__ A total(int row, int border) {
    A chosen = A(0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int b = 0; b < kBorder; ++b) {
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
          sum[i][b] += __shfl_xor_sync(0xffffffffu, sum[i][b], step);
        }
        if (i == row && b == border) chosen = sum[i][b];
      }
    }
    return chosen;
  }
};

template <class T, int kBorder>
__global__ __launch_bounds__(kThreads, 2) void border_product_narrow_kernel(Task task) {
  using A = compute_t<T>;
  using V = Vec<T, kVector<T>>;
  __shared__ __align__(16) A stage[kBorder * kColumns<T>];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Rows& x = task.x;
  const int64_t row = task.first_row + (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  const T* rows[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {  // what is beyond the last row or column is read but not used
    rows[i] = static_cast<const T*>(x.data) + x.offset(row + i < x.count ? row + i : x.count - 1);
  }

  Sums<T, kBorder> sums;
  for (int64_t first = 0; first < x.features; first += kColumns<T>) {
    V pieces[kRows][kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = first + (v * kWarp + lane) * V::kSize;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        pieces[i][v] =
            load(reinterpret_cast<const V*>(rows[i] + (column < x.features ? column : 0)));
      }
    }
    stage_border<T, kBorder>(task, first, stage);
    __syncthreads();
    sums.add(pieces, stage);
    __syncthreads();
  }

  const int i = lane / kMaxWidth, b = lane % kMaxWidth;
  A total = sums.total(i, b);
  if (i >= kRows || row + i >= x.count) return;
  if (x.ones != 0 && b < task.border) {
    const A* const e = static_cast<const A*>(task.e) + b * task.dim + x.features;
    total += static_cast<A>(x.ones) * load(e);
  }
  store(static_cast<A*>(task.out) + (row + i - task.first_row) * kMaxWidth + b, total);
}

template <class T, int kBorder>
void launch_border_product(const Task& task, Stream stream) {
  constexpr int kRowsOfBlock = kWarps * kRows;
  const int64_t blocks = (task.x.count - task.first_row + kRowsOfBlock - 1) / kRowsOfBlock;
  launch(Launch{"border_product_narrow", blocks, kThreads, stream},
         border_product_narrow_kernel<T, kBorder>, task);
}

}  // namespace

bool border_product_is_narrow(const Rows& x, int64_t border) {
  return border <= kMaxWidth && x.access == RowAccess::kVectors;
}

void border_product_narrow(const Rows& x, const void* e, int64_t border, int64_t first_row,
                           void* out, Stream stream) {
  const Task task{x, e, x.dim(), border, first_row, out};
  visit_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (border <= 1) return launch_border_product<T, 1>(task, stream);
    if (border <= 2) return launch_border_product<T, 2>(task, stream);
    launch_border_product<T, 4>(task, stream);
  });
}

}  // namespace singd::cuda
