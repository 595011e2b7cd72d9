// S = X E^T for bfloat16 rows X [m, d] and a float32 border E [b, d], b <= 64, on the tensor cores:
// E is split exactly into three bfloat16 planes that add up to it, sums are float32.
//
// A block owns 64 rows and all border columns, padded to 16, 32 or 64; it walks along d in steps of
// 128 columns, of which X and the planes of E are staged in shared memory. Warps are 4 row tiles x
// 2 halves: of the border tiles, or of the columns if there is one border tile. The next step's
// rows of X are on their way meanwhile.
//
// Reads X once, E from L2 once per block, writes S.
#include "gram.h"
#include "launch.cuh"
#include "matrix.cuh"
#include "row_stager.cuh"

namespace singd::cuda {
namespace {

constexpr int kRows = 64;
constexpr int kColumns = 128;
constexpr int kStride = kColumns + 8;
constexpr int kPlanes = 3;
constexpr int kRowTiles = kRows / kTile;

template <int kTiles>
struct Shape {
  static constexpr int kBorder = kTiles * kTile;
  static constexpr int kTilesPerWarp = kTiles > 1 ? kTiles / 2 : 1;
  static constexpr int kHalves = kTiles > 1 ? 1 : 2;  // of the columns
  static constexpr int kOutStride = kBorder + 4;
  static constexpr int kStageBytes = (kRows + kPlanes * kBorder) * kStride * 2;
  static constexpr int kOutBytes = kHalves * kRows * kOutStride * 4;
  static constexpr int kSharedBytes = kStageBytes > kOutBytes ? kStageBytes : kOutBytes;
};

struct Task {
  Rows x;
  const float* e;
  int64_t dim, border, width, first_row;
  float* out;
};

// Columns first ... first + 127 of E as planes, zero beyond its edges.
template <int kTiles>
__device__ __forceinline__ void stage_border(const Task& task, int64_t first, bfloat16* stage) {
  constexpr int kStep = kGramThreads / kColumns;  // rows
  const int column = threadIdx.x % kColumns;
  const bool inside = first + column < task.dim;
  const float* from = task.e + first + column;
#pragma unroll 4
  for (int row = threadIdx.x / kColumns; row < kTiles * kTile; row += kStep) {
    const float value = inside && row < task.border ? load(from + row * task.dim) : 0.0f;
    bfloat16 planes[kPlanes];
    to_planes(value, planes);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      shared_store(stage + (p * kTiles * kTile + row) * kStride + column, planes[p]);
    }
  }
}

template <int kTiles, RowAccess kAccess>
__global__ __launch_bounds__(kGramThreads, 2) void border_product_bfloat16_kernel(Task task) {
  using S = Shape<kTiles>;
  bfloat16* x_stage = dynamic_shared<bfloat16>();
  bfloat16* e_stage = x_stage + kRows * kStride;
  const int warp = threadIdx.x / kWarp, row_tile = warp % kRowTiles, half = warp / kRowTiles;
  const int first_tile = S::kHalves == 1 ? half * S::kTilesPerWarp : 0;
  const int first_step = S::kHalves == 1 ? 0 : half * kTile;
  const int64_t first_row = task.first_row + static_cast<int64_t>(blockIdx.x) * kRows;

  MatrixSums sums[S::kTilesPerWarp];
  const auto runs = [](int64_t first) { return TileRuns{{first, 0}, {kColumns / kTile, 0}}; };
  Stager<bfloat16, bfloat16, kRows, kColumns / kTile, 1, kAccess> x;
  x.fetch(task.x, runs(0), first_row, task.x.count);
  for (int64_t first = 0; first < task.dim; first += kColumns) {
    x.put(task.x, runs(first), first_row, task.x.count, x_stage, kStride);
    stage_border<kTiles>(task, first, e_stage);
    __syncthreads();
    if (first + kColumns < task.dim) {
      x.fetch(task.x, runs(first + kColumns), first_row, task.x.count);
    }
#pragma unroll 2
    for (int k = first_step; k < kColumns; k += S::kHalves * kTile) {
      MatrixOperand<bfloat16> a;
      load_left<false>(a, x_stage + row_tile * kTile * kStride + k, kStride);
#pragma unroll
      for (int n = 0; n < S::kTilesPerWarp; ++n) {
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          MatrixOperand<bfloat16> b;
          const int row = p * S::kBorder + (first_tile + n) * kTile;
          load_right<true>(b, e_stage + row * kStride + k, kStride);
          multiply(sums[n], a, b);
        }
      }
    }
    __syncthreads();
  }

  float* sum_stage = dynamic_shared<float>();
  const int copy = S::kHalves == 1 ? 0 : half;
#pragma unroll
  for (int n = 0; n < S::kTilesPerWarp; ++n) {
    float* to = sum_stage + (copy * kRows + row_tile * kTile) * S::kOutStride;
    to += (first_tile + n) * kTile;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const int lane = threadIdx.x % kWarp;
      const Vec<float, 2> pair{{sums[n].values[e], sums[n].values[e + 1]}};
      float* const at = to + matrix_row(lane, e) * S::kOutStride + matrix_column(lane, e);
      shared_store(reinterpret_cast<Vec<float, 2>*>(at), pair);
    }
  }
  __syncthreads();
  using Part = Vec<float, 4>;
  for (int n = threadIdx.x; n < kRows * S::kBorder / 4; n += kGramThreads) {
    const int row = n / (S::kBorder / 4), column = n % (S::kBorder / 4) * 4;
    if (first_row + row >= task.x.count) break;
    if (column >= task.width) continue;
    const float* from = sum_stage + row * S::kOutStride + column;
    Part total = shared_load(reinterpret_cast<const Part*>(from));
    if (S::kHalves == 2) {
      const Part other = shared_load(reinterpret_cast<const Part*>(from + kRows * S::kOutStride));
#pragma unroll
      for (int v = 0; v < 4; ++v) total[v] += other[v];
    }
    float* to = task.out + (first_row - task.first_row + row) * task.width + column;
    store(reinterpret_cast<Part*>(to), total);
  }
}

template <int kTiles>
void launch_border_product(const Task& task, Stream stream) {
  visit_access(task.x.access, [&](auto access) {
    const int64_t blocks = (task.x.count - task.first_row + kRows - 1) / kRows;
    launch(Launch{"border_product_bfloat16", blocks, kGramThreads, stream,
                  Shape<kTiles>::kSharedBytes},
           border_product_bfloat16_kernel<kTiles, decltype(access)::value>, task);
  });
}

}  // namespace

void border_product_bfloat16(const Rows& x, const float* e, int64_t border, int64_t first_row,
                             float* out, Stream stream) {
  const Task task{x, e, x.dim(), border, border_width(border), first_row, out};
  if (border <= 16) return launch_border_product<1>(task, stream);
  if (border <= 32) return launch_border_product<2>(task, stream);
  launch_border_product<4>(task, stream);
}

}  // namespace singd::cuda
