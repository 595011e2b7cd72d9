// A tile of the update on the tensor cores, by one block of 8 warps. With delta and N of a side
// (preconditioned_update.h), transposed, so that Z^T goes from the sums of one product to the
// operand of the next within a warp's registers:
//
//   Z^T[j, i] = delta_K[j] G[i, j] + sum_t N_K[t, j] S[i, t]
//   P^T[j, i] = delta_C[i] Z[i, j] + sum_t N_C[t, i] Q[t, j]
//
// S: the columns of G that a block of A_K meets, or the border columns of a row-bordered K, or
// G N_K^T; Q: the rows of Z that a block of A_C meets, or N_C Z of a bordered C.
//
// A tile is up to 64 rows high and up to 128 columns wide, of which a warp owns 16.
#pragma once

#include "planes.cuh"
#include "step.cuh"

namespace singd::cuda {

constexpr int kTileColumns = 128;
constexpr int kPad = 8;  // elements beside a row, so that rows of 16 bytes meet no bank twice
constexpr int kGradientPitch = kTileColumns + kPad;
constexpr int kResultPitch = kTileColumns + 4;
static_assert(kTileColumns == kStepThreads / kWarp * kMatrix, "a warp owns 16 columns");

template <class E>
struct TileShape {
  static constexpr int kGradientPlanes = kStoredPlanes<typename E::Stored>;
  static constexpr int kPlanes = kComputePlanes<typename E::Stored>;  // of factors and of Z
  static constexpr int kRows = 64;
  static constexpr int kRowTiles = kRows / kMatrix;
  static constexpr int kLeftPitch = kRows + kPad;
};

SINGD_HOST_DEVICE inline int whole_matrices(int count) {
  return (count + kMatrix - 1) / kMatrix * kMatrix;
}

// TileOperands of bfloat16 in shared memory, and their sizes. The float32 result lies over them.
template <class E>
struct TileOperands {
  int border_pitch, border_plane, left_rows, left_plane;
  int border, left, size;  // G comes first

  SINGD_HOST_DEVICE explicit TileOperands(const StepLayer& l) {
    using S = TileShape<E>;
    border_pitch = whole_matrices(l.right.width) + kPad;
    border_plane = S::kRows * border_pitch;
    left_rows = l.left.bordered() ? whole_matrices(l.left.width) : S::kRows;
    left_plane = left_rows * S::kLeftPitch;
    border = S::kGradientPlanes * S::kRows * kGradientPitch;
    left = border + (l.right.bordered() ? S::kPlanes * border_plane : 0);
    size = left + (l.left.action == Action::kDiagonal ? 0 : S::kPlanes * left_plane);
  }
  SINGD_HOST_DEVICE size_t bytes() const {
    const size_t operands = size * sizeof(bfloat16);
    const size_t result = TileShape<E>::kRows * kResultPitch * sizeof(float);
    return operands > result ? operands : result;
  }
};

// The columns or rows that one of the factor's own meets: N[t, index] for t < count, at position
// origin + t.
struct Band {
  int origin = 0, count = 0;

  __device__ Band(const SideShape& side, int64_t index, int64_t dim, int64_t first) {
    if (index >= dim) return;
    count = side.width;
    if (side.action != Action::kBlocks) return;
    const int start = static_cast<int>(index) / side.width * side.width;
    origin = start - static_cast<int>(first);
    count = min(count, static_cast<int>(dim) - start);
  }
};

template <class E>
class TileUpdate {
 public:
  using S = TileShape<E>;

  __device__ TileUpdate(const StepLayer& layer, const Tile& t)
      : l(layer),
        tile(t),
        arrays(layer),
        offsets(layer),
        workspace(static_cast<const float*>(layer.workspace)),
        shared(dynamic_shared<bfloat16>()),
        lane(threadIdx.x % kWarp),
        first_slot(static_cast<int>(threadIdx.x) / kWarp * kMatrix) {}

  // Everything that the products read.
  __device__ __forceinline__ void stage() {
    stage_gradient();
    if (l.right.bordered()) stage_border();
    if (l.left.action == Action::kBlocks) stage_left_blocks();
    if (l.left.bordered()) stage_left_border();
  }

  // P of the warp's columns, transposed.
  __device__ __forceinline__ void multiply(MatrixSums (&p)[S::kRowTiles]) const {
    MatrixSums z[S::kRowTiles];
    if (l.right.action != Action::kDiagonal) multiply_right(z);
    if (l.right.action != Action::kBlocks) add_diagonal(z);
    if (l.right.action == Action::kRowBordered) replace_border_columns(z);
    if (l.left.action == Action::kBlocks) return multiply_left_blocks(z, p);
    scale_rows(z, p);
    if (l.left.bordered()) add_left_border(p);
    if (l.left.action == Action::kRowBordered) replace_border_rows(p);
  }

  __device__ __forceinline__ void store_result(const MatrixSums (&p)[S::kRowTiles]) const {
    for_each_entry(p, [&](int row, int slot, const float& value) {
      shared_store(result_row(row) + slot, value);
    });
  }

  __device__ float* result_row(int row) const {
    return reinterpret_cast<float*>(shared) + row * kResultPitch;
  }

 private:
  const StepLayer& l;
  const Tile& tile;
  const TileOperands<E> arrays;
  const StepOffsets offsets;
  const float* const workspace;
  bfloat16* const shared;
  const int lane, first_slot;

  // f(row, slot, value) for the lane's entries of the warp's columns.
  template <class Sums, class Function>
  __device__ __forceinline__ void for_each_entry(Sums& sums, Function&& f) const {
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        f(n * kMatrix + matrix_column(lane, e), first_slot + matrix_row(lane, e),
          sums[n].values[e]);
      }
    }
  }

  __device__ __forceinline__ void put(bfloat16* to, int plane, float value) const {
    bfloat16 planes[S::kPlanes];
    split(value, planes);
#pragma unroll
    for (int p = 0; p < S::kPlanes; ++p) shared_store(to + p * plane, planes[p]);
  }

  __device__ __forceinline__ void stage_gradient() const {
    constexpr int kCount = E::kCount, kAcross = kTileColumns / kCount;
    constexpr int kVectors = S::kRows * kAcross / kStepThreads;
    float g[kVectors][kCount];
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const int at = n * kStepThreads + threadIdx.x, row = at / kAcross;
      const int j = tile.base + at % kAcross * kCount, end = tile.column + tile.columns;
      const Columns c{j, max(0, tile.column - j), min(kCount, end - j)};
      const bool inside = row < tile.rows && c.begin < c.end;
#pragma unroll
      for (int e = 0; e < kCount; ++e) g[n][e] = 0;
      if (!inside) continue;
      load_gradient<E, Cache::kStreaming>(l, tile.row + row, c, g[n]);
      prefetch_update<E>(l, tile.row + row, c);
    }
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const int at = n * kStepThreads + threadIdx.x;
      Vec<bfloat16, kCount> parts[S::kGradientPlanes];
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        bfloat16 planes[S::kGradientPlanes];
        split(g[n][e], planes);
#pragma unroll
        for (int p = 0; p < S::kGradientPlanes; ++p) parts[p][e] = planes[p];
      }
      bfloat16* const to = shared + at / kAcross * kGradientPitch + at % kAcross * kCount;
#pragma unroll
      for (int p = 0; p < S::kGradientPlanes; ++p) {
        shared_store(reinterpret_cast<Vec<bfloat16, kCount>*>(to + p * S::kRows * kGradientPitch),
                     parts[p]);
      }
    }
  }

  // S of a bordered K as [row, t].
  __device__ __forceinline__ void stage_border() const {
    const SideShape& side = l.right;
    const int depth = arrays.border_pitch - kPad;
    for (int at = threadIdx.x; at < S::kRows * depth; at += kStepThreads) {
      const int row = at / depth, t = at % depth;
      const int64_t i = tile.row + row;
      float value = 0;
      if (row < tile.rows && t < side.width) {
        value = side.action == Action::kRowBordered
                    ? load_gradient<E>(l, i, static_cast<int>(side.border_index(t, l.columns)))
                    : load(workspace + offsets.products + i * side.width + t);
      }
      put(shared + arrays.border + row * arrays.border_pitch + t, arrays.border_plane, value);
    }
  }

  // A_C as [source row, row], zero between its blocks.
  __device__ __forceinline__ void stage_left_blocks() const {
    const int row = threadIdx.x % S::kRows;
    const Band band(l.left, tile.row + row, l.rows, tile.row);
    stage_left(row, band.origin, row < tile.rows ? band.count : 0);
  }

  // N_C of a bordered C as [t, row].
  __device__ __forceinline__ void stage_left_border() const {
    const int row = threadIdx.x % S::kRows;
    stage_left(row, 0, row < tile.rows ? l.left.width : 0);
  }

  // N_C[:, row], from position `origin` on.
  __device__ __forceinline__ void stage_left(int row, int origin, int count) const {
    static_assert(kStepThreads % S::kRows == 0);
    const int64_t pitch = padded(l.rows);
    const float* const n = workspace + offsets.left_n + tile.row + row;
    bfloat16* const to = shared + arrays.left + row;
#pragma unroll 4
    for (int depth = threadIdx.x / S::kRows; depth < arrays.left_rows;
         depth += kStepThreads / S::kRows) {
      const int t = depth - origin;
      const float value = t >= 0 && t < count ? load(n + t * pitch) : 0.0f;
      put(to + depth * S::kLeftPitch, arrays.left_plane, value);
    }
  }

  // Z^T += N_K^T S^T.
  __device__ __forceinline__ void multiply_right(MatrixSums (&z)[S::kRowTiles]) const {
    const SideShape& side = l.right;
    const bool blocks = side.action == Action::kBlocks;
    const int64_t first = tile.base + first_slot, pitch = padded(l.columns);
    const Band bands[2] = {Band(side, first + lane / 4, l.columns, tile.base),
                           Band(side, first + lane / 4 + 8, l.columns, tile.base)};
    int begin = 0, end = side.width;
    if (blocks) {  // what the warp's first and last column meet
      const int64_t last = min(static_cast<int64_t>(tile.column + tile.columns), first + kMatrix);
      begin = max(0, Band(side, first, l.columns, tile.base).origin);
      end = last <= first ? 0 : band_end(side, last - 1);
    }
    const bfloat16* const source = blocks ? shared : shared + arrays.border;
    const int source_pitch = blocks ? kGradientPitch : arrays.border_pitch;
    const float* const n = workspace + offsets.right_n + first + lane / 4;
    for (int k = begin / kMatrix * kMatrix; k < end; k += kMatrix) {
      float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int half = e / 2 % 2, t = k + matrix_column(lane, e) - bands[half].origin;
        const bool inside = t >= 0 && t < bands[half].count;
        values[e] = inside ? load(n + t * pitch + 8 * half) : 0.0f;
      }
      MatrixOperand<bfloat16> a[S::kPlanes];
      split(values, a);
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        const bfloat16* const from = source + r * kMatrix * source_pitch + k;
        if (blocks) {
          multiply_planes<S::kPlanes, S::kPlanes, S::kGradientPlanes>(
              z[r], a, [&](int q, MatrixOperand<bfloat16>& b) {
                load_right<true>(b, from + q * S::kRows * kGradientPitch, source_pitch);
              });
        } else {
          multiply_planes<S::kPlanes, S::kPlanes, S::kPlanes>(
              z[r], a, [&](int q, MatrixOperand<bfloat16>& b) {
                load_right<true>(b, from + q * arrays.border_plane, source_pitch);
              });
        }
      }
    }
  }

  __device__ int band_end(const SideShape& side, int64_t index) const {
    const Band band(side, index, l.columns, tile.base);
    return band.origin + band.count;
  }

  // Z^T += delta_K G^T.
  __device__ __forceinline__ void add_diagonal(MatrixSums (&z)[S::kRowTiles]) const {
    const int64_t j = tile.base + first_slot + lane / 4;
    float delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = j + 8 * half < l.columns;
      delta[half] = inside ? load(workspace + offsets.right_delta + j + 8 * half) : 0.0f;
    }
    for_each_entry(z, [&](int row, int slot, float& value) {
      float g = 0;
#pragma unroll
      for (int p = S::kGradientPlanes - 1; p >= 0; --p) {
        g += widen<float>(shared_load(shared + (p * S::kRows + row) * kGradientPitch + slot));
      }
      value += (slot % 16 < 8 ? delta[0] : delta[1]) * g;
    });
  }

  __device__ __forceinline__ void replace_border_columns(MatrixSums (&z)[S::kRowTiles]) const {
    const SideShape& side = l.right;
    for_each_entry(z, [&](int row, int slot, float& value) {
      const int64_t j = tile.base + slot;
      if (j >= l.columns || row >= tile.rows || !side.is_border(j, l.columns)) return;
      value = load(workspace + offsets.products + (tile.row + row) * side.width +
                   side.border_row(j, l.columns));
    });
  }

  // P^T = Z^T A_C.
  __device__ __forceinline__ void multiply_left_blocks(const MatrixSums (&z)[S::kRowTiles],
                                                       MatrixSums (&p)[S::kRowTiles]) const {
    const int width = l.left.width;
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
      const int last = min((r + 1) * kMatrix, tile.rows) - 1;
      if (last < r * kMatrix) break;
      // Tiles begin where blocks do.
      const int begin = r * kMatrix / width * width, end = (last / width + 1) * width;
      MatrixOperand<bfloat16> a[S::kPlanes];
      split(z[r].values, a);
#pragma unroll
      for (int n = 0; n < S::kRowTiles; ++n) {
        if ((n + 1) * kMatrix <= begin || n * kMatrix >= end) continue;
        const bfloat16* const from =
            shared + arrays.left + r * kMatrix * S::kLeftPitch + n * kMatrix;
        multiply_planes<S::kPlanes, S::kPlanes, S::kPlanes>(
            p[n], a, [&](int q, MatrixOperand<bfloat16>& b) {
              load_right<false>(b, from + q * arrays.left_plane, S::kLeftPitch);
            });
      }
    }
  }

  // P^T = Z^T diag(delta_C).
  __device__ __forceinline__ void scale_rows(const MatrixSums (&z)[S::kRowTiles],
                                             MatrixSums (&p)[S::kRowTiles]) const {
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int row = n * kMatrix + matrix_column(lane, e);
        if (row >= tile.rows) continue;
        p[n].values[e] = load(workspace + offsets.left_delta + tile.row + row) * z[n].values[e];
      }
    }
  }

  // P^T += Q^T N_C.
  __device__ __forceinline__ void add_left_border(MatrixSums (&p)[S::kRowTiles]) const {
    const SideShape& side = l.left;
    const int64_t first = tile.base + first_slot, pitch = padded(l.columns);
    const int begin = side.action == Action::kRowBordered ? side.width : 0;
    const float* const q_rows = workspace + offsets.thin_result + begin * pitch + first + lane / 4;
    for (int k = 0; k < side.width; k += kMatrix) {
      float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int half = e / 2 % 2, t = k + matrix_column(lane, e);
        const bool inside = t < side.width && first + lane / 4 + 8 * half < l.columns;
        values[e] = inside ? load(q_rows + t * pitch + 8 * half) : 0.0f;
      }
      MatrixOperand<bfloat16> a[S::kPlanes];
      split(values, a);
#pragma unroll
      for (int n = 0; n < S::kRowTiles; ++n) {
        const bfloat16* const from = shared + arrays.left + k * S::kLeftPitch + n * kMatrix;
        multiply_planes<S::kPlanes, S::kPlanes, S::kPlanes>(
            p[n], a, [&](int q, MatrixOperand<bfloat16>& b) {
              load_right<false>(b, from + q * arrays.left_plane, S::kLeftPitch);
            });
      }
    }
  }

  __device__ __forceinline__ void replace_border_rows(MatrixSums (&p)[S::kRowTiles]) const {
    const SideShape& side = l.left;
    for_each_entry(p, [&](int row, int slot, float& value) {
      const int64_t i = tile.row + row, j = tile.base + slot;
      if (row >= tile.rows || j >= l.columns || !side.is_border(i, l.rows)) return;
      value = load(workspace + offsets.thin_result +
                   side.border_row(i, l.rows) * padded(l.columns) + j);
    });
  }
};

}  // namespace singd::cuda
