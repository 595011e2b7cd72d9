// The operands of matrix_update's products, which the launch itself prepares, of a layer before its
// first tile: as planes of bfloat16 (planes.cuh), in the order in which the lanes of a warp take
// them. Nobody needs them after the layer's last tile.
//
// With delta and N of a side (preconditioned_update.h), a tile of up to 64 x 128 or 32 x 256 is
//
//   Z[i, j] = delta_K[j] G[i, j] + sum_t left_Z[i, t] right_Z[t, j]
//   P[i, j] = delta_C[i] Z[i, j] + sum_t left_P[i, t] right_P[t, j]
//
//   K or C            left_Z            right_Z       left_P        right_P
//   blocks            G itself          A_K           A_C           Z itself
//   row-bordered      columns B of G    N_K           N_C^T         rows B of Z
//   column-bordered   G N_K^T           N_K           N_C^T         N_C Z
//
// A left operand is 16 rows of a tile, for 16 values of t; a right one 16 of the columns of a unit,
// which are 32 columns of a tile. Of blocks, t runs over the 16s of the tile's rows or columns that
// the operand's blocks meet, of borders over all 16s of the width.
//
// Column n (of 16) of operand h (0 or 1) of a unit is its column 8 (n % 8 / 2) + 4 h + 2 (n / 8) +
// n % 2. So the values of a lane in the products of both are those of eight neighbouring columns,
// and move as vectors.
#pragma once

#include "preconditioned_update.h"

namespace singd::cuda {

constexpr int kMatrixSide = 16;   // rows and columns of an operand
constexpr int kUnitColumns = 32;  // of a tile, that a warp computes at a time
constexpr int kLaneBytes = 16;    // of a plane of an operand
constexpr int kOperandFloats = 32 * kLaneBytes / 4;
constexpr int kHeadFloats = 64;  // before the first operand: matrix_layer.cuh

// 16s from begin to end.
struct Steps {
  int begin = 0, end = 0;
};

// The 16s of t that rows or columns of a tile take.
class StepRanges {
 public:
  StepRanges() = default;
  SINGD_HOST_DEVICE explicit StepRanges(const SideShape& side)
      : width_(side.action == Action::kBlocks ? side.width : 0),
        inverse_(width_ == 0 ? 0 : (1 << kShift) / width_ + 1),
        border_{0, (side.width + kMatrixSide - 1) / kMatrixSide} {}

  // Of `count` rows or columns from `first` on, in a tile that owns `owned`, whole blocks, from
  // `origin` on.
  SINGD_HOST_DEVICE Steps of(int origin, int owned, int first, int count) const {
    if (width_ == 0) return border_;
    const int low = first > origin ? first - origin : 0;
    const int high = first + count - origin < owned ? first + count - origin : owned;
    if (low >= high) return {};
    const int begin = blocks(low) * width_, end = (blocks(high - 1) + 1) * width_;
    return {(origin + begin) / kMatrixSide,
            (origin + (end < owned ? end : owned) + kMatrixSide - 1) / kMatrixSide};
  }

 private:
  static constexpr int kShift = 16;
  int width_, inverse_;
  Steps border_;

  // position / width, exact for positions below 2^16 / width.
  SINGD_HOST_DEVICE int blocks(int position) const { return position * inverse_ >> kShift; }
};

// No range of StepRanges is longer, for so many rows or columns.
SINGD_HOST_DEVICE inline int most_steps(const SideShape& side, int count) {
  const int width = side.width;
  if (side.action != Action::kBlocks) return (width + kMatrixSide - 1) / kMatrixSide;
  if (count % width == 0) return count / kMatrixSide;
  if (width % count == 0) return width / kMatrixSide;
  return (count + 2 * (width - 1) + kMatrixSide - 1) / kMatrixSide + 1;
}

// The arrays of a layer's operands, in floats beyond those of StepOffsets. An item, which a warp
// makes, is a left operand or both right ones of a unit, in all planes.
struct MatrixOffsets {
  enum Array { kLeftZ, kRightZ, kLeftP, kRightP, kArrays };
  int begin[kArrays], count[kArrays], size;  // count: items
  int steps_z, steps_p;                      // an array has so many for one range of t
  int groups, units;                         // of a tile: 16s of rows, units of columns

  SINGD_HOST_DEVICE explicit MatrixOffsets(const StepLayer& l)
      : steps_z(most_steps(l.right, kUnitColumns)),
        steps_p(most_steps(l.left, kMatrixSide)),
        groups(l.wide_tiles() ? 2 : 4),
        units(l.wide_tiles() ? 8 : 4) {
    const int left = l.planes == 0 ? 0 : l.row_tiles() * groups;
    const int right = l.planes == 0 ? 0 : l.column_tiles() * units;
    count[kLeftZ] = l.right.bordered() ? left * steps_z : 0;
    count[kRightZ] = l.right.action == Action::kDiagonal ? 0 : right * steps_z;
    count[kLeftP] = l.left.action == Action::kDiagonal ? 0 : left * steps_p;
    count[kRightP] = l.left.bordered() ? right * steps_p : 0;
    size = l.planes == 0 ? 0 : kHeadFloats;
    for (int n = 0; n < kArrays; ++n) {
      begin[n] = size;
      size += count[n] * (is_right(n) ? 2 : 1) * l.planes * kOperandFloats;
    }
  }
  SINGD_HOST_DEVICE static constexpr bool is_right(int array) {
    return array == kRightZ || array == kRightP;
  }
  SINGD_HOST_DEVICE int items() const {
    return count[kLeftZ] + count[kRightZ] + count[kLeftP] + count[kRightP];
  }
};

}  // namespace singd::cuda
