// The border columns of Y = X K for a column-bordered K: S = X E^T, S [m, b], E [b, d], b <= 64;
// for bfloat16 rows see border_product_bfloat16.cu, for b <= 4 border_product_narrow.cu.
//
// A block owns 64 rows and all border columns, padded to 16, 32 or 64; it walks along d in steps of
// 256 bytes of the compute type, staging 64 rows of X and b rows of E in shared memory. A thread
// owns 4 rows x 1, 2 or 4 border columns. The next vectors of X are on their way meanwhile.
//
// Reads X once, E from L2 once per block, writes S.
#include "gram.h"
#include "launch.cuh"
#include "row_stager.cuh"

namespace singd::cuda {
namespace {

constexpr int kRows = 64;
constexpr int kRowsPerThread = 4;

struct Task {
  Rows x;
  const void* e;
  int64_t dim, border, width, first_row;
  void* out;
};

template <class T, int kTiles, RowAccess kAccess>
struct Shape {
  using A = compute_t<T>;
  static constexpr int kColumns = 256 / static_cast<int>(sizeof(A));
  static constexpr int kStride = kColumns + kVector<A>;
  static constexpr int kBorder = kTiles * kTile;
  static constexpr int kSharedBytes = (kRows + kBorder) * kStride * static_cast<int>(sizeof(A));
  using Input = Stager<T, A, kRows, kColumns / kTile, 1, kAccess>;
};

// Columns first ... of E, zero beyond its edges.
template <class S>
__device__ __forceinline__ void stage_border(const Task& task, int64_t first,
                                             typename S::A* stage) {
  using A = typename S::A;
#pragma unroll 4
  for (int n = threadIdx.x; n < S::kBorder * S::kColumns; n += kGramThreads) {
    const int row = n / S::kColumns, column = n % S::kColumns;
    A value = A(0);
    if (row < task.border && first + column < task.dim) {
      value = load(static_cast<const A*>(task.e) + row * task.dim + first + column);
    }
    shared_store(stage + row * S::kStride + column, value);
  }
}

template <class T, int kTiles, RowAccess kAccess>
__global__ __launch_bounds__(kGramThreads, 2) void border_product_kernel(Task task) {
  using S = Shape<T, kTiles, kAccess>;
  using A = typename S::A;
  using Part = Vec<A, kVector<A>>;
  A* x_stage = dynamic_shared<A>();
  A* e_stage = x_stage + kRows * S::kStride;
  const int row = threadIdx.x / kTile * kRowsPerThread, column = threadIdx.x % kTile;
  const int64_t first_row = task.first_row + static_cast<int64_t>(blockIdx.x) * kRows;

  A sum[kRowsPerThread][kTiles];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) sum[i][n] = A(0);
  }
  const auto runs = [](int64_t first) { return TileRuns{{first, 0}, {S::kColumns / kTile, 0}}; };
  typename S::Input input;
  input.fetch(task.x, runs(0), first_row, task.x.count);
  for (int64_t first = 0; first < task.dim; first += S::kColumns) {
    input.put(task.x, runs(first), first_row, task.x.count, x_stage, S::kStride);
    stage_border<S>(task, first, e_stage);
    __syncthreads();
    if (first + S::kColumns < task.dim) {
      input.fetch(task.x, runs(first + S::kColumns), first_row, task.x.count);
    }
#pragma unroll 2
    for (int k = 0; k < S::kColumns; k += kVector<A>) {
      Part x[kRowsPerThread];
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        x[i] = shared_load(reinterpret_cast<const Part*>(x_stage + (row + i) * S::kStride + k));
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const Part e = shared_load(
            reinterpret_cast<const Part*>(e_stage + (column + n * kTile) * S::kStride + k));
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
          for (int v = 0; v < kVector<A>; ++v) sum[i][n] += x[i][v] * e[v];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int64_t r = first_row + row + i;
    if (r >= task.x.count) continue;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int c = column + n * kTile;
      if (c >= task.width) continue;
      store(static_cast<A*>(task.out) + (r - task.first_row) * task.width + c, sum[i][n]);
    }
  }
}

template <class T, int kTiles>
void launch_border_product(const Task& task, Stream stream) {
  visit_access(task.x.access, [&](auto access) {
    constexpr RowAccess kAccess = decltype(access)::value;
    const int64_t blocks = (task.x.count - task.first_row + kRows - 1) / kRows;
    launch(Launch{"border_product", blocks, kGramThreads, stream,
                  Shape<T, kTiles, kAccess>::kSharedBytes},
           border_product_kernel<T, kTiles, kAccess>, task);
  });
}

}  // namespace

int64_t border_width(int64_t border) { return (border + 3) / 4 * 4; }

void border_product(const Rows& x, const void* e, int64_t border, int64_t first_row, void* out,
                    Stream stream) {
  if (border_product_is_narrow(x, border)) {
    return border_product_narrow(x, e, border, first_row, out, stream);
  }
  const Task task{x, e, x.dim(), border, border_width(border), first_row, out};
  if (x.dtype == Dtype::kBFloat16) {
    return border_product_bfloat16(x, static_cast<const float*>(e), border, first_row,
                                   static_cast<float*>(out), stream);
  }
  visit_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, bfloat16>) {
      if (border <= 16) return launch_border_product<T, 1>(task, stream);
      if (border <= 32) return launch_border_product<T, 2>(task, stream);
      launch_border_product<T, 4>(task, stream);
    }
  });
}

}  // namespace singd::cuda
