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
class TileUpdate {
 public:
  using S = TileShape<E, Kind>;

  // `common` is in shared memory.
  __device__ TileUpdate(const StepLayer& layer, const TileLayer& common, int number)
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

  // The next tile is the block's, too.
  __device__ __forceinline__ void run(bool has_next) {
    if (has_next) ask_for_next();
    if constexpr (Kind::kRightBlocks) {
      stage_gradient();
      __syncthreads();
    }
#pragma unroll 1
    for (int n = 0; n < kUnitsOfWarp; ++n) {
      const int unit = n * S::kWarps + slot;
      const bool active = group * kMatrixSide < tile.rows && unit * kUnitColumns < owned_end();
      MatrixSums p[2];
      if (active) make_z(unit, p);
      if constexpr (Kind::kLeftBlocks) {
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
  bfloat16* const shared;
  const int lane, group, slot;  // group: 16 rows of the tile; slot: the warp's number there
  Tile tile;
  int row_tile, column_tile;
  bool in_vectors;  // G, M and W of the tile are whole vectors

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

  // A plane of a prepared operand: of the warp's 16 rows, or of half a unit's columns; `step`
  // counts from the first one, of `steps` that the array has room for.
  __device__ __forceinline__ void load_left_operand(MatrixOffsets::Array array, int steps, int step,
                                                    int plane, Operand& operand) const {
    load_operand(array, (row_tile * S::kGroups + group) * steps + step, plane, operand);
  }
  __device__ __forceinline__ void load_right_operand(MatrixOffsets::Array array, int unit,
                                                     int steps, int step, int half, int plane,
                                                     Operand& operand) const {
    const int number = (column_tile * S::kWarps * kUnitsOfWarp + unit) * steps + step;
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
    if constexpr (Kind::kRightBlocks) {
      const bfloat16* const rows = shared + group * kMatrixSide * S::kPitch;
      const auto load_gradient_plane = [&](int step, int plane, Operand& a) {
        load_left<false>(a, rows + plane * S::kPlane + step * kMatrixSide, S::kPitch);
      };
      return multiply_steps<S::kGradientPlanes>(z, range, load_gradient_plane, load_right_z);
    }
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
    bfloat16* const to = shared + S::kZ + slot * kUnitColumns;
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
              reinterpret_cast<Vec<bfloat16, 2>*>(to + p * S::kZPlane + i * S::kZPitch + j),
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
    const bfloat16* const z = shared + S::kZ + slot * kUnitColumns;
    p[0] = p[1] = MatrixSums();
    const auto load_factor = [&](int step, int plane, Operand& a) {
      load_left_operand(MatrixOffsets::kLeftP, steps, step - range.begin, plane, a);
    };
    const auto load_z = [&](int step, int half, int plane, Operand& b) {
      const bfloat16* const from = z + step * kMatrixSide * S::kZPitch + half * kMatrixSide;
      load_right<false>(b, from + plane * S::kZPlane, S::kZPitch);
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
};

}  // namespace singd::cuda
