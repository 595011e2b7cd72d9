// A tile of the update on the tensor cores, by one block of 8 warps: see matrix_operands.h for what
// is multiplied. A warp owns 16 rows and, one after the other, two units of 32 columns. G is
// brought to shared memory where blocks of K multiply it, and Z where blocks of C do; M, W, and G
// elsewhere, go straight between memory and the lanes, which hold eight neighbouring columns of two
// rows.
#pragma once

#include "matrix_layer.cuh"
#include "planes.cuh"

namespace singd::cuda {

constexpr int kTileElements = 8192;
constexpr int kPad = 8;  // elements beside a row, so that rows of 16 bytes meet no bank twice
constexpr int kLaneColumns = 8;
constexpr int kUnitsOfWarp = 2;

template <class E>
struct TileShape {
  static constexpr int kGradientPlanes = kStoredPlanes<typename E::Stored>;
  static constexpr int kPlanes = kComputePlanes<typename E::Stored>;  // of factors and of Z
  static constexpr int kParts = kLaneColumns / E::kCount;             // vectors of a lane's row
};

// The planes in shared memory, in elements: G of the tile, and Z of one unit of every warp.
template <class E, bool kRightBlocks, bool kLeftBlocks>
struct TilePlanes {
  int rows, pitch, z_pitch, plane, z_plane, z, size;

  SINGD_HOST_DEVICE explicit TilePlanes(bool wide)
      : rows(wide ? 32 : 64),
        pitch(kTileElements / rows + kPad),
        z_pitch(kTileElements / rows / kUnitsOfWarp + kPad),
        plane(rows * pitch),
        z_plane(rows * z_pitch),
        z(kRightBlocks ? TileShape<E>::kGradientPlanes * plane : 0),
        size(z + (kLeftBlocks ? TileShape<E>::kPlanes * z_plane : 0)) {}
};

// kRightBlocks: K has blocks; kLeftBlocks: C has; kStochastic: M and W are rounded stochastically.
template <class E, bool kRightBlocks, bool kLeftBlocks, bool kStochastic>
class TileUpdate {
 public:
  using S = TileShape<E>;

  // `common` is in shared memory.
  __device__ TileUpdate(const StepLayer& layer, const TileLayer& common, int number)
      : l(layer),
        common(common),
        planes(layer.wide_tiles()),
        shared(dynamic_shared<bfloat16>()),
        lane(threadIdx.x % kWarp) {
    const int across = shared_load(&common.across);
    row_tile = number / across;
    column_tile = number - row_tile * across;
    tile.row = row_tile * l.tile_rows;
    tile.column = column_tile * l.tile_columns;
    tile.rows = min(static_cast<int>(l.tile_rows), l.rows - tile.row);
    tile.columns = min(static_cast<int>(l.tile_columns), l.columns - tile.column);
    tile.base = tile.column / E::kCount * E::kCount;
    in_vectors = l.gradient_in_vectors && tile.base == tile.column &&
                 tile.columns % E::kCount == 0 && tile.base + tile.columns <= l.weight_columns();
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    warps = l.wide_tiles() ? 4 : 2;
    group = l.wide_tiles() ? warp / 4 : warp / 2;
    slot = warp & (warps - 1);
  }

  __device__ __forceinline__ void run() {
    if constexpr (kRightBlocks) {
      stage_gradient();
      __syncthreads();
    }
#pragma unroll 1
    for (int n = 0; n < kUnitsOfWarp; ++n) {
      const int unit = n * warps + slot;
      const bool active = group * kMatrixSide < tile.rows && unit * kUnitColumns < owned_end();
      MatrixSums p[2];
      if (active) make_z(unit, p);
      if constexpr (kLeftBlocks) {
        if (n > 0) __syncthreads();
        if (active) store_z(p);
        __syncthreads();
        if (active) multiply_left(p);
      } else {
        if (active) finish(unit, p);
      }
      if (active) apply(unit, p);
    }
  }

 private:
  using Operand = MatrixOperand<bfloat16>;

  const StepLayer& l;
  const TileLayer& common;
  const TilePlanes<E, kRightBlocks, kLeftBlocks> planes;
  bfloat16* const shared;
  const int lane;
  Tile tile;
  int row_tile, column_tile;
  int warps, group, slot;  // warps of a group of 16 rows, and the warp's number there
  bool in_vectors;         // G, M and W of the tile are whole vectors

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

  // --- From memory

  __device__ __forceinline__ void stage_gradient() const {
    in_vectors ? stage_vectors() : stage_elements();
  }

  // All vectors of a thread are on their way before the first one is stored.
  __device__ __forceinline__ void stage_vectors() const {
    using Vector = Vec<typename E::Stored, E::kCount>;
    constexpr int kVectors = kTileElements / E::kCount / kStepThreads;
    constexpr int kAcross = kTileElements / 64 / E::kCount;  // of a tile that is not wide
    const int across = l.wide_tiles() ? 2 * kAcross : kAcross, thread = threadIdx.x;
    const int i = l.wide_tiles() ? thread / (2 * kAcross) : thread / kAcross;
    const int rows_at_once = l.wide_tiles() ? kStepThreads / (2 * kAcross) : kStepThreads / kAcross;
    const int j = (thread & (across - 1)) * E::kCount;
    const auto* const from = static_cast<const typename E::Stored*>(l.gradient) +
                             static_cast<int64_t>(tile.row + i) * l.gradient_pitch + tile.base + j;
    const int64_t step = static_cast<int64_t>(rows_at_once) * l.gradient_pitch;
    Vector g[kVectors];
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const bool inside = i + n * rows_at_once < tile.rows && j < tile.columns;
      g[n] = Vector{};
      if (inside) g[n] = load<Cache::kStreaming>(reinterpret_cast<const Vector*>(from + n * step));
    }
    prefetch_rows(i, rows_at_once, j);
    bfloat16* const to = shared + i * planes.pitch + j;
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      Vec<bfloat16, E::kCount> parts[S::kGradientPlanes];
      split_vector(g[n], parts);
#pragma unroll
      for (int p = 0; p < S::kGradientPlanes; ++p) {
        bfloat16* const at = to + p * planes.plane + n * rows_at_once * planes.pitch;
        shared_store(reinterpret_cast<Vec<bfloat16, E::kCount>*>(at), parts[p]);
      }
    }
  }

  // Asks for M and W of the tile.
  __device__ __forceinline__ void prefetch_rows(int first, int step, int j) const {
    if (j >= tile.columns) return;
    const Parameters<E> parameters(l);
    for (int i = first; i < tile.rows; i += step) {
      const int64_t at = static_cast<int64_t>(tile.row + i) * l.weight_columns() + tile.base + j;
      prefetch(parameters.weight + at);
      if (parameters.momentum != nullptr) prefetch(parameters.momentum + at);
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
          parts[p][e] = pairs[p][0];
          parts[p][e + 1] = pairs[p][1];
        }
      }
    }
  }

  __device__ __forceinline__ void stage_elements() const {
    const int width = planes.pitch - kPad;
    for (int at = threadIdx.x; at < kTileElements; at += kStepThreads) {
      const int i = at / width, j = tile.base + at % width;
      const bool inside = i < tile.rows && j >= tile.column && j < tile.column + tile.columns;
      const float g = inside ? load_gradient<E>(l, tile.row + i, j) : 0.0f;
      bfloat16 parts[S::kGradientPlanes];
      split(g, parts);
#pragma unroll
      for (int p = 0; p < S::kGradientPlanes; ++p) {
        shared_store(shared + p * planes.plane + i * planes.pitch + at % width, parts[p]);
      }
    }
  }

  // A plane of a prepared operand: of the warp's 16 rows, or of half a unit's columns; `step`
  // counts from the first one, of `steps` that the array has room for.
  __device__ __forceinline__ void load_left_operand(MatrixOffsets::Array array, int steps, int step,
                                                    int plane, Operand& operand) const {
    load_operand(array, (row_tile * (kStepThreads / kWarp / warps) + group) * steps + step, plane,
                 operand);
  }
  __device__ __forceinline__ void load_right_operand(MatrixOffsets::Array array, int unit,
                                                     int steps, int step, int half, int plane,
                                                     Operand& operand) const {
    const int number = (column_tile * warps * kUnitsOfWarp + unit) * steps + step;
    load_operand(array, number * 2 + half, plane, operand);
  }

  __device__ __forceinline__ void load_operand(MatrixOffsets::Array array, int number, int plane,
                                               Operand& operand) const {
    const float* const from = shared_load(&common.prepared) +
                              shared_load(common.operands.begin + array) +
                              number * (S::kPlanes * kOperandFloats) + lane * (kLaneBytes / 4);
    const auto words = load(reinterpret_cast<const Vec<float, 4>*>(from + plane * kOperandFloats));
    memcpy(&operand, &words, sizeof words);
  }

  // --- Z

  __device__ __forceinline__ void make_z(int unit, MatrixSums (&z)[2]) const {
    const Steps range =
        shared_read(&common.right).of(origin(), tile.columns, unit * kUnitColumns, kUnitColumns);
    const int steps = shared_load(&common.operands.steps_z);
    const auto load_right_z = [&](int step, int half, int plane, Operand& b) {
      load_right_operand(MatrixOffsets::kRightZ, unit, steps, step - range.begin, half, plane, b);
    };
    if constexpr (kRightBlocks) {
      const bfloat16* const rows = shared + group * kMatrixSide * planes.pitch;
      const auto load_gradient_plane = [&](int step, int plane, Operand& a) {
        load_left<false>(a, rows + plane * planes.plane + step * kMatrixSide, planes.pitch);
      };
      return multiply_steps<S::kGradientPlanes>(z, range, load_gradient_plane, load_right_z);
    }
    if (in_vectors) ask_for(unit);
    if (l.right.bordered()) {
      const auto load_left_z = [&](int step, int plane, Operand& a) {
        load_left_operand(MatrixOffsets::kLeftZ, steps, step, plane, a);
      };
      multiply_steps<S::kPlanes>(z, range, load_left_z, load_right_z);
    }
    float g[2][kLaneColumns] = {};
    in_vectors ? load_vectors(unit, g) : load_elements(unit, g);
    float delta[kLaneColumns];
    load_right_delta(unit, delta);
#pragma unroll
    for (int m = 0; m < kLaneColumns; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) value(z, h, m) += delta[m] * g[h][m];
    }
    if (l.right.action == Action::kRowBordered) replace_border_columns(unit, z);
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

  // Asks for G, M and W in the lane's rows and columns.
  __device__ __forceinline__ void ask_for(int unit) const {
    const auto* const gradient = static_cast<const typename E::Stored*>(l.gradient);
    const Parameters<E> parameters(l);
    const int j = column(unit);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!is_inside(h, j)) continue;
      const int64_t i = tile.row + row(h), at = i * l.weight_columns() + j;
      prefetch(gradient + i * l.gradient_pitch + j);
      prefetch(parameters.weight + at);
      if (parameters.momentum != nullptr) prefetch(parameters.momentum + at);
    }
  }

  // G in the lane's rows and columns.
  __device__ __forceinline__ void load_vectors(int unit, float (&g)[2][kLaneColumns]) const {
    using Vector = Vec<typename E::Stored, E::kCount>;
    const auto* const gradient = static_cast<const typename E::Stored*>(l.gradient);
    Vector vectors[2][S::kParts];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < S::kParts; ++n) {
        const int j = column(unit) + n * E::kCount;
        const int64_t i = tile.row + row(h);
        vectors[h][n] = Vector{};
        if (!is_inside(h, j)) continue;
        vectors[h][n] = load<Cache::kStreaming>(
            reinterpret_cast<const Vector*>(gradient + i * l.gradient_pitch + j));
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

  // Column by column, as load_elements.
  __device__ __forceinline__ void replace_border_columns(int unit, MatrixSums (&z)[2]) const {
    const SideShape& side = l.right;
    const int first = column(unit), last = min(first + kLaneColumns, l.columns) - 1;
    if (first > last || !(side.is_border(first, l.columns) || side.is_border(last, l.columns))) {
      return;  // a border lies at the ends
    }
#pragma unroll 1
    for (int m = 0; m < kLaneColumns; ++m) {
      const int j = first + m;
      const bool is_border = j <= last && side.is_border(j, l.columns);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float next = value(z, h, 0);
        if (is_border && row(h) < tile.rows) {
          next = load(shared_load(&common.products) +
                      static_cast<int64_t>(tile.row + row(h)) * side.width +
                      side.border_row(j, l.columns));
        }
        rotate(z, h);
        value(z, h, kLaneColumns - 1) = next;
      }
    }
  }

  // --- P

  // Z of the unit as planes, in the order of the lanes' columns.
  __device__ __forceinline__ void store_z(const MatrixSums (&z)[2]) const {
    bfloat16* const to = shared + planes.z + slot * kUnitColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        const int i = group * kMatrixSide + matrix_row(lane, e);
        const int j = half * kMatrixSide + matrix_column(lane, e);
        Vec<bfloat16, 2> pairs[S::kPlanes];
        split_pair(z[half].values[e], z[half].values[e + 1], pairs);
#pragma unroll
        for (int p = 0; p < S::kPlanes; ++p) {
          shared_store(
              reinterpret_cast<Vec<bfloat16, 2>*>(to + p * planes.z_plane + i * planes.z_pitch + j),
              pairs[p]);
        }
      }
    }
  }

  // P = A_C Z for blocks of C.
  __device__ __forceinline__ void multiply_left(MatrixSums (&p)[2]) const {
    const Steps range =
        shared_read(&common.left).of(0, tile.rows, group * kMatrixSide, kMatrixSide);
    const int steps = shared_load(&common.operands.steps_p);
    const bfloat16* const z = shared + planes.z + slot * kUnitColumns;
    p[0] = p[1] = MatrixSums();
    const auto load_factor = [&](int step, int plane, Operand& a) {
      load_left_operand(MatrixOffsets::kLeftP, steps, step - range.begin, plane, a);
    };
    const auto load_z = [&](int step, int half, int plane, Operand& b) {
      const bfloat16* const from = z + step * kMatrixSide * planes.z_pitch + half * kMatrixSide;
      load_right<false>(b, from + plane * planes.z_plane, planes.z_pitch);
    };
    multiply_steps<S::kPlanes>(p, range, load_factor, load_z);
  }

  // P = diag(delta_C) Z, and the border of C, from Z.
  __device__ __forceinline__ void finish(int unit, MatrixSums (&p)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool inside = row(h) < tile.rows;
      const float delta = inside ? load(shared_load(&common.left_delta) + tile.row + row(h)) : 0.0f;
#pragma unroll
      for (int m = 0; m < kLaneColumns; ++m) value(p, h, m) *= delta;
    }
    if (!l.left.bordered()) return;
    const int steps = shared_load(&common.operands.steps_p);
    const auto load_left_p = [&](int step, int plane, Operand& a) {
      load_left_operand(MatrixOffsets::kLeftP, steps, step, plane, a);
    };
    const auto load_right_p = [&](int step, int half, int plane, Operand& b) {
      load_right_operand(MatrixOffsets::kRightP, unit, steps, step, half, plane, b);
    };
    multiply_steps<S::kPlanes>(p, Steps{0, steps}, load_left_p, load_right_p);
    if (l.left.action != Action::kRowBordered) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t i = tile.row + row(h);
      if (row(h) < tile.rows && l.left.is_border(i, l.rows)) replace_border_row(unit, h, i, p);
    }
  }

  __device__ __forceinline__ void replace_border_row(int unit, int h, int64_t i,
                                                     MatrixSums (&p)[2]) const {
    const float* const from = shared_load(&common.thin_result) +
                              l.left.border_row(i, l.rows) * padded(l.columns) + column(unit);
#pragma unroll
    for (int m = 0; m < kLaneColumns; ++m) {
      if (column(unit) + m < l.columns) value(p, h, m) = load(from + m);
    }
  }

  // c += A B over a range of steps. The products of the smaller of three planes are summed by
  // themselves: tensor cores cut off what is below the last bit of a sum, each time they add to it.
  template <int kPlanesA, class LoadA, class LoadB>
  __device__ __forceinline__ void multiply_steps(MatrixSums (&c)[2], const Steps& range,
                                                 LoadA&& load_a, LoadB&& load_b) const {
    constexpr bool kApart = S::kPlanes > 2;
    MatrixSums low[2];
#pragma unroll 1
    for (int step = range.begin; step < range.end; ++step) {
      Operand a[kPlanesA];
#pragma unroll
      for (int p = 0; p < kPlanesA; ++p) load_a(step, p, a[p]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int q = 0; q < S::kPlanes; ++q) {
          Operand b;
          load_b(step, half, q, b);
#pragma unroll
          for (int p = 0; p < kPlanesA && p + q < S::kPlanes; ++p) {
            multiply(kApart && p + q > 0 ? low[half] : c[half], a[p], b);
          }
        }
      }
    }
    if constexpr (kApart) {
#pragma unroll
      for (int n = 0; n < 16; ++n) c[n / 8].values[n % 8] += low[n / 8].values[n % 8];
    }
  }

  // --- M and W

  __device__ __forceinline__ void apply(int unit, MatrixSums (&p)[2]) const {
    Update<float> update = shared_read(&common.update);
    if (!in_vectors) return update_elements(unit, update, p);
    if constexpr (!kStochastic) update.key = RoundingKey{};  // what is known takes no registers
    // Random numbers, or two vectors a row, need the registers of a row.
    constexpr int kRowsAtOnce = kStochastic || S::kParts > 1 ? 1 : 2;
    update_vectors<kRowsAtOnce>(unit, update, p);
  }

  template <int kRowsAtOnce>
  __device__ __forceinline__ void update_vectors(int unit, const Update<float>& update,
                                                 MatrixSums (&p)[2]) const {
    const Parameters<E> parameters(l);
    const int64_t width = l.weight_columns();
    const int64_t first = (tile.row + row(0)) * width + column(unit);
#pragma unroll
    for (int h0 = 0; h0 < 2; h0 += kRowsAtOnce) {
      VectorUpdate<E> vectors[kRowsAtOnce][S::kParts];
#pragma unroll
      for (int at = 0; at < kRowsAtOnce * S::kParts; ++at) {
        const int h = h0 + at / S::kParts, n = at % S::kParts;
        if (!is_inside(h, column(unit) + n * E::kCount)) continue;
        vectors[h - h0][n].load_from(parameters, first + 8 * h * width + n * E::kCount);
      }
#pragma unroll
      for (int at = 0; at < kRowsAtOnce * S::kParts; ++at) {
        const int h = h0 + at / S::kParts, n = at % S::kParts;
        if (!is_inside(h, column(unit) + n * E::kCount)) continue;
        float values[E::kCount];
#pragma unroll
        for (int e = 0; e < E::kCount; ++e) values[e] = value(p, h, n * E::kCount + e);
        vectors[h - h0][n].apply(parameters, update, first + 8 * h * width + n * E::kCount, values);
      }
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
};

}  // namespace singd::cuda
