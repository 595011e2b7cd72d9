// What a warp of matrix_update's tile (matrix_tile.cuh) moves between memory, shared memory and its
// registers: G of the tile to shared memory where blocks of K multiply it; elsewhere G, and always
// M and W, as eight neighbouring columns of two rows a lane.
#pragma once

#include "matrix_layer.cuh"
#include "planes.cuh"

namespace singd::cuda {

constexpr int kTileElements = 8192;
constexpr int kPad = 8;  // elements beside a row, so that rows of 16 bytes meet no bank twice
constexpr int kLaneColumns = 8;
constexpr int kUnitsOfWarp = 2;

// The kinds of layers that are compiled apart: K has blocks, C has, tiles are 32 x 256, and M and W
// are rounded stochastically.
template <bool kRightBlocks_, bool kLeftBlocks_, bool kWide_, bool kStochastic_>
struct TileKind {
  static constexpr bool kRightBlocks = kRightBlocks_, kLeftBlocks = kLeftBlocks_;
  static constexpr bool kWide = kWide_, kStochastic = kStochastic_;
};

// A tile, and the planes in shared memory, in elements: G of the tile, and Z of one unit of every
// warp.
template <class E, class Kind>
struct TileShape {
  static constexpr int kGradientPlanes = kStoredPlanes<typename E::Stored>;
  static constexpr int kPlanes = kComputePlanes<typename E::Stored>;  // of factors and of Z
  static constexpr int kParts = kLaneColumns / E::kCount;             // vectors of a lane's row
  static constexpr int kRows = Kind::kWide ? 32 : 64, kColumns = kTileElements / kRows;
  static constexpr int kGroups = kRows / kMatrixSide;            // of 16 rows
  static constexpr int kWarps = kStepThreads / kWarp / kGroups;  // of a group
  static constexpr int kPitch = kColumns + kPad, kPlane = kRows * kPitch;
  static constexpr int kZPitch = kWarps * kUnitColumns + kPad, kZPlane = kRows * kZPitch;
  static constexpr int kZ = Kind::kRightBlocks ? kGradientPlanes * kPlane : 0;
  static constexpr int kSize = kZ + (Kind::kLeftBlocks ? kPlanes * kZPlane : 0);
  static_assert(kColumns == kWarps * kUnitsOfWarp * kUnitColumns);
};

template <class E, class Kind>
class TileMemory {
 public:
  using S = TileShape<E, Kind>;

  // `common` is in shared memory.
  __device__ TileMemory(const StepLayer& layer, const TileLayer& common, int number)
      : l(layer),
        common(common),
        shared(dynamic_shared<bfloat16>()),
        lane(threadIdx.x % kWarp),
        group(static_cast<int>(threadIdx.x) / kWarp / S::kWarps),
        slot(static_cast<int>(threadIdx.x) / kWarp % S::kWarps) {
    row_tile = number / shared_load(&common.across);
    column_tile = number - row_tile * shared_load(&common.across);
    tile = tile_at(row_tile, column_tile);
    in_vectors = moves_in_vectors(tile);
  }

 protected:
  const StepLayer& l;
  const TileLayer& common;
  bfloat16* const shared;
  const int lane, group, slot;  // group: 16 rows of the tile; slot: the warp's number there
  Tile tile;
  int row_tile, column_tile;
  bool in_vectors;  // G, M and W of the tile are whole vectors

  __device__ int origin() const { return tile.column - tile.base; }
  __device__ int owned_end() const { return origin() + tile.columns; }

  // The lane's rows and columns: value `e` of p[half] lies in row(e / 2 % 2), and the eight of a
  // row in neighbouring columns from column(unit) on.
  __device__ int row(int h) const { return group * kMatrixSide + lane / 4 + 8 * h; }
  __device__ int column(int unit) const {
    return tile.base + unit * kUnitColumns + lane % 4 * kLaneColumns;
  }
  static __device__ __forceinline__ float& value(MatrixSums (&p)[2], int h, int m) {
    return p[m / 4].values[m % 4 / 2 * 4 + h * 2 + m % 2];
  }
  // Moves each of a row's values but the first to the column before.
  static __device__ __forceinline__ void rotate(MatrixSums (&p)[2], int h) {
#pragma unroll
    for (int m = 0; m + 1 < kLaneColumns; ++m) value(p, h, m) = value(p, h, m + 1);
  }

  __device__ bool is_inside(int h, int j) const {
    return row(h) < tile.rows && j >= tile.column && j < tile.column + tile.columns;
  }

  // The block's threads over the vectors of a tile: a thread has one in every kRowsAtOnce-th row.
  static constexpr int kAcross = S::kColumns / E::kCount, kRowsAtOnce = kStepThreads / kAcross;
  static constexpr int kVectors = S::kRows / kRowsAtOnce;
  static __device__ int vector_row() { return static_cast<int>(threadIdx.x) / kAcross; }
  static __device__ int vector_column() {
    return static_cast<int>(threadIdx.x) % kAcross * E::kCount;
  }

  // Asks for G, M and W of the next tile.
  __device__ __forceinline__ void ask_for_next() const {
    const bool wraps = column_tile + 1 == shared_load(&common.across);
    const Tile next = tile_at(row_tile + (wraps ? 1 : 0), wraps ? 0 : column_tile + 1);
    const int j = vector_column();
    if (j >= next.columns || !moves_in_vectors(next)) return;
    const Parameters<E> parameters(shared_load(&common.weight), shared_load(&common.momentum));
    const auto* const gradient =
        static_cast<const typename E::Stored*>(shared_load(&common.gradient));
    const int64_t width = shared_load(&common.weight_columns);
    const int64_t pitch = shared_load(&common.gradient_pitch);
#pragma unroll 1
    for (int row = vector_row(); row < next.rows; row += kRowsAtOnce) {
      const int64_t i = next.row + row, at = i * width + next.base + j;
      prefetch(gradient + i * pitch + next.base + j);
      prefetch(parameters.weight + at);
      if (parameters.momentum != nullptr) prefetch(parameters.momentum + at);
    }
  }

  __device__ __forceinline__ void stage_gradient() const {
    in_vectors ? stage_vectors() : stage_elements();
  }

  // All vectors of a thread are on their way before the first one is stored.
  __device__ __forceinline__ void stage_vectors() const {
    using Vector = Vec<typename E::Stored, E::kCount>;
    const int i = vector_row(), j = vector_column();
    const int64_t pitch = shared_load(&common.gradient_pitch), step = kRowsAtOnce * pitch;
    const auto* const from = static_cast<const typename E::Stored*>(shared_load(&common.gradient)) +
                             (tile.row + i) * pitch + tile.base + j;
    Vector g[kVectors];
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const bool inside = i + n * kRowsAtOnce < tile.rows && j < tile.columns;
      g[n] = Vector{};
      if (inside) g[n] = load<Cache::kStreaming>(reinterpret_cast<const Vector*>(from + n * step));
    }
    bfloat16* const to = shared + i * S::kPitch + j;
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      Vec<bfloat16, E::kCount> parts[S::kGradientPlanes];
      split_vector(g[n], parts);
#pragma unroll
      for (int p = 0; p < S::kGradientPlanes; ++p) {
        bfloat16* const at = to + p * S::kPlane + n * kRowsAtOnce * S::kPitch;
        shared_store(reinterpret_cast<Vec<bfloat16, E::kCount>*>(at), parts[p]);
      }
    }
  }

  __device__ __forceinline__ void split_vector(
      const Vec<typename E::Stored, E::kCount>& g,
      Vec<bfloat16, E::kCount> (&parts)[S::kGradientPlanes]) const {
    if constexpr (S::kGradientPlanes == 1) {
      parts[0] = g;
    } else {
#pragma unroll
      for (int e = 0; e < E::kCount; e += 2) {
        Vec<bfloat16, 2> pairs[S::kGradientPlanes];
        split_pair(widen<float>(g[e]), widen<float>(g[e + 1]), pairs);
#pragma unroll
        for (int p = 0; p < S::kGradientPlanes; ++p) {
          memcpy(static_cast<void*>(parts[p].values + e), &pairs[p], sizeof pairs[p]);
        }
      }
    }
  }

  __device__ __forceinline__ void stage_elements() const {
    const int width = S::kColumns;
    for (int at = threadIdx.x; at < kTileElements; at += kStepThreads) {
      const int i = at / width, j = tile.base + at % width;
      const bool inside = i < tile.rows && j >= tile.column && j < tile.column + tile.columns;
      const float g = inside ? load_gradient<E>(l, tile.row + i, j) : 0.0f;
      bfloat16 parts[S::kGradientPlanes];
      split(g, parts);
#pragma unroll
      for (int p = 0; p < S::kGradientPlanes; ++p) {
        shared_store(shared + p * S::kPlane + i * S::kPitch + at % width, parts[p]);
      }
    }
  }

  // Tiles begin at vectors where K has no blocks; beyond the last column G is 0.
  __device__ __forceinline__ void load_right_delta(int unit, float (&delta)[kLaneColumns]) const {
    using Vector = Vec<float, kVector<float>>;
    const auto* const from = reinterpret_cast<const Vector*>(shared_load(&common.right_delta));
#pragma unroll
    for (int m = 0; m < kLaneColumns; m += Vector::kSize) {
      Vector part = {};
      if (column(unit) < l.columns) part = load(from + (column(unit) + m) / Vector::kSize);
#pragma unroll
      for (int e = 0; e < Vector::kSize; ++e) delta[m + e] = part[e];
    }
  }

  // G in the lane's rows and columns.
  __device__ __forceinline__ void load_vectors(int unit, float (&g)[2][kLaneColumns]) const {
    using Vector = Vec<typename E::Stored, E::kCount>;
    const auto* const gradient =
        static_cast<const typename E::Stored*>(shared_load(&common.gradient));
    const int64_t pitch = shared_load(&common.gradient_pitch);
    Vector vectors[2][S::kParts];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < S::kParts; ++n) {
        const int j = column(unit) + n * E::kCount;
        const int64_t i = tile.row + row(h);
        vectors[h][n] = Vector{};
        if (!is_inside(h, j)) continue;
        vectors[h][n] =
            load<Cache::kStreaming>(reinterpret_cast<const Vector*>(gradient + i * pitch + j));
      }
    }
#pragma unroll
    for (int m = 0; m < kLaneColumns; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        g[h][m] = widen<float>(vectors[h][m / E::kCount][m % E::kCount]);
      }
    }
  }

  // Column by column, each pushing on those before: a loop that is not unrolled knows no other
  // index of registers.
  __device__ __forceinline__ void load_elements(int unit, float (&g)[2][kLaneColumns]) const {
#pragma unroll 1
    for (int m = 0; m < kLaneColumns; ++m) {
      const int j = column(unit) + m;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int k = 0; k + 1 < kLaneColumns; ++k) g[h][k] = g[h][k + 1];
        g[h][kLaneColumns - 1] = is_inside(h, j) ? load_gradient<E>(l, tile.row + row(h), j) : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void apply(int unit, MatrixSums (&p)[2]) const {
    Update<float> update = shared_read(&common.update);
    if constexpr (!Kind::kStochastic)
      update.key = RoundingKey{};  // what is known takes no registers
    if (!in_vectors) return update_elements(unit, update, p);
    update_vectors(unit, update, p);
  }

  // Random numbers, or two vectors a row, need the registers of a row.
  static constexpr int kUpdateRows = Kind::kStochastic || S::kParts > 1 ? 1 : 2;

  __device__ __forceinline__ void update_vectors(int unit, const Update<float>& update,
                                                 MatrixSums (&p)[2]) const {
    const Parameters<E> parameters(shared_load(&common.weight), shared_load(&common.momentum));
    const int64_t width = shared_load(&common.weight_columns);
    const int64_t first = (tile.row + row(0)) * width + column(unit);
    const auto for_each = [&](int row_group, auto&& f) {
#pragma unroll
      for (int at = 0; at < kUpdateRows * S::kParts; ++at) {
        const int h = row_group + at / S::kParts, n = at % S::kParts;
        if (is_inside(h, column(unit) + n * E::kCount)) {
          f(at, h, n, first + 8 * h * width + n * E::kCount);
        }
      }
    };
#pragma unroll
    for (int row_group = 0; row_group < 2; row_group += kUpdateRows) {
      VectorUpdate<E> vectors[kUpdateRows * S::kParts];
      for_each(row_group,
               [&](int at, int, int, int64_t place) { vectors[at].load_from(parameters, place); });
      for_each(row_group, [&](int at, int h, int n, int64_t place) {
        float values[E::kCount];
#pragma unroll
        for (int e = 0; e < E::kCount; ++e) values[e] = value(p, h, n * E::kCount + e);
        vectors[at].apply(parameters, update, place, values);
      });
    }
  }

  // Column by column, as load_elements; p is not needed any more.
  __device__ __forceinline__ void update_elements(int unit, const Update<float>& update,
                                                  MatrixSums (&p)[2]) const {
    const int width = l.weight_columns();
#pragma unroll 1
    for (int m = 0; m < kLaneColumns; ++m) {
      const int j = column(unit) + m;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t i = tile.row + row(h);
        const bool is_bias = j >= width;
        if (is_inside(h, j)) {
          update_element<E>(l, update, is_bias, is_bias ? i : i * width + j, value(p, h, 0));
        }
        rotate(p, h);
      }
    }
  }

 private:
  __device__ __forceinline__ Tile tile_at(int row_tile, int column_tile) const {
    const int height = shared_load(&common.tile_rows), width = shared_load(&common.tile_columns);
    Tile t;
    t.row = row_tile * height;
    t.column = column_tile * width;
    t.rows = min(height, shared_load(&common.rows) - t.row);
    t.columns = min(width, shared_load(&common.columns) - t.column);
    t.base = t.column / E::kCount * E::kCount;
    return t;
  }
  __device__ __forceinline__ bool moves_in_vectors(const Tile& t) const {
    return shared_load(&common.gradient_in_vectors) != 0 && t.base == t.column &&
           t.columns % E::kCount == 0 && t.base + t.columns <= shared_load(&common.weight_columns);
  }
};

}  // namespace singd::cuda
