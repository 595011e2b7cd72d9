// The operands of matrix_update's products (matrix_operands.h), from delta, N, S and the thin
// results in a layer's workspace. A warp makes an item: a lane its eight elements of each operand.
#pragma once

#include "matrix_layer.cuh"
#include "planes.cuh"

namespace singd::cuda {

template <class E>
class OperandMaker {
 public:
  __device__ explicit OperandMaker(const StepLayer& layer)
      : operands(layer),
        l(layer),
        offsets(layer),
        workspace(static_cast<float*>(layer.workspace)),
        lane(threadIdx.x % kWarp) {}

  __device__ __forceinline__ void make(int item) const {
#pragma unroll
    for (int array = 0; array < MatrixOffsets::kArrays; ++array) {
      if (item < operands.count[array]) {
        const int operand = MatrixOffsets::is_right(array) ? 2 * item : item;
        float* const to = workspace + offsets.size + operands.begin[array] +
                          int64_t{operand} * kPlanes * kOperandFloats + lane * (kLaneBytes / 4);
        const bool z = array == MatrixOffsets::kLeftZ || array == MatrixOffsets::kRightZ;
        return MatrixOffsets::is_right(array) ? make_right(item, z, to) : make_left(item, z, to);
      }
      item -= operands.count[array];
    }
  }

  const MatrixOffsets operands;

 private:
  static constexpr int kPlanes = kComputePlanes<typename E::Stored>;
  using Columns8 = float[8];

  const StepLayer& l;
  const StepOffsets offsets;
  float* const workspace;
  const int lane;

  // Of an item: its row or column of tiles, its part of these, and its step.
  struct Position {
    int tile, part, step;
  };
  __device__ __forceinline__ Position position(int item, bool z, int parts) const {
    const int steps = z ? operands.steps_z : operands.steps_p;
    return {item / steps / parts, item / steps % parts, item % steps};
  }

  __device__ __forceinline__ void make_left(int item, bool z, float* to) const {
    const SideShape& side = z ? l.right : l.left;
    const auto [tile, part, step] = position(item, z, operands.groups);
    const int first = part * kMatrixSide;
    const int64_t tile_row = int64_t{tile} * l.tile_rows;
    const int rows = static_cast<int>(min(int64_t{l.tile_rows}, l.rows - tile_row));
    const Steps range = StepRanges(side).of(0, rows, first, kMatrixSide);
    if (range.begin + step >= range.end) return;
    const int64_t origin = side.action == Action::kBlocks ? tile_row : 0;  // of t
    float values[8] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = first + matrix_row(lane, e);
      const int64_t t = origin + (range.begin + step) * kMatrixSide + matrix_column(lane, e);
      if (i < rows) values[e] = z ? left_z(tile_row + i, t) : left_p(tile_row + i, t);
    }
    put(to, values);
  }

  // Lanes 4 q + p take columns of 8 (q / 2) ... 8 (q / 2) + 7, which they load as vectors.
  __device__ __forceinline__ void make_right(int item, bool z, float* to) const {
    const SideShape& side = z ? l.right : l.left;
    const auto [tile, part, step] = position(item, z, operands.units);
    const int first = part * kUnitColumns;
    const int64_t column = int64_t{tile} * l.tile_columns;
    const int owned = static_cast<int>(min(int64_t{l.tile_columns}, l.columns - column));
    const int64_t base = column / E::kCount * E::kCount;
    const int origin = static_cast<int>(column - base);
    const Steps range = StepRanges(side).of(origin, owned, first, kUnitColumns);
    if (range.begin + step >= range.end) return;
    const int64_t first_t = side.action == Action::kBlocks && z ? base : 0;
    const int q = lane / 4, j = first + q / 2 * 8;  // in the tile
    float values[2][8] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t t =
          first_t + (range.begin + step) * kMatrixSide + lane % 4 * 2 + k % 2 + k / 2 * 8;
      Columns8 row = {};
      if (base + j < l.columns) z ? right_z(t, base + j, row) : right_p(t, base + j, row);
#pragma unroll
      for (int m = 0; m < 4; ++m) {  // column q + m % 2 * 8 of operand m / 2
        const int at = j + 2 * m + q % 2;
        const float value = q % 2 == 0 ? row[2 * m] : row[2 * m + 1];
        values[m / 2][m % 2 * 4 + k] = at >= origin && at < origin + owned ? value : 0.0f;
      }
    }
    put(to, values[0]);
    put(to + kPlanes * kOperandFloats, values[1]);
  }

  // Blocks of width w are w x w entries of N: row t - start(index) of column `index`.
  __device__ __forceinline__ float left_p(int64_t i, int64_t t) const {
    const SideShape& side = l.left;
    if (side.action == Action::kBlocks) t -= i / side.width * side.width;
    if (t < 0 || t >= side.width) return 0;
    return load(workspace + offsets.left_n + t * padded(l.rows) + i);
  }

  __device__ __forceinline__ float left_z(int64_t i, int64_t t) const {
    const SideShape& side = l.right;
    if (t >= side.width) return 0;
    if (side.action == Action::kRowBordered) {
      return load_gradient<E>(l, i, static_cast<int>(side.border_index(t, l.columns)));
    }
    return load(workspace + offsets.products + i * side.width + t);
  }

  // Eight columns from j on. Rows of the workspace are padded to 16 numbers.
  __device__ __forceinline__ void right_z(int64_t t, int64_t j, Columns8& row) const {
    const SideShape& side = l.right;
    const int64_t pitch = padded(l.columns);
    const float* const n = workspace + offsets.right_n;
    if (side.action != Action::kBlocks) {
      if (t < side.width) load_columns(n + t * pitch, j, pitch, row);
      return;
    }
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      if (j + m >= l.columns) break;
      const int64_t inside = t - (j + m) / side.width * side.width;
      if (inside >= 0 && inside < side.width) row[m] = load(n + inside * pitch + j + m);
    }
  }

  __device__ __forceinline__ void right_p(int64_t t, int64_t j, Columns8& row) const {
    const int width = l.left.width;
    if (t >= width) return;
    const int64_t pitch = padded(l.columns);
    const int64_t at = l.left.action == Action::kRowBordered ? width + t : t;
    load_columns(workspace + offsets.thin_result + at * pitch, j, pitch, row);
  }

  static __device__ __forceinline__ void load_columns(const float* from, int64_t j, int64_t pitch,
                                                      Columns8& row) {
    using Vector = Vec<float, kVector<float>>;
#pragma unroll
    for (int m = 0; m < 8; m += Vector::kSize) {
      if (j + m >= pitch) break;
      const Vector part = load(reinterpret_cast<const Vector*>(from + j + m));
#pragma unroll
      for (int e = 0; e < Vector::kSize; ++e) row[m + e] = part[e];
    }
  }

  __device__ __forceinline__ void put(float* to, const float (&values)[8]) const {
    MatrixOperand<bfloat16> planes[kPlanes];
    split(values, planes);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      Vec<float, 4> words;
      memcpy(&words, &planes[p], sizeof words);
      store(reinterpret_cast<Vec<float, 4>*>(to + p * kOperandFloats), words);
    }
  }
};

}  // namespace singd::cuda
