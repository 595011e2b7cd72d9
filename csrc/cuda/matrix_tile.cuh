// A tile of the update on the tensor cores, by one block of 8 warps: see matrix_operands.h for what
// is multiplied. A warp owns 16 rows and, one after the other, two units of 32 columns. Z goes
// through shared memory where blocks of C multiply it.
#pragma once

#include "matrix_memory.cuh"

namespace singd::cuda {

template <class E, class Kind>
class TileUpdate : private TileMemory<E, Kind> {
  using Memory = TileMemory<E, Kind>;
  using S = TileShape<E, Kind>;
  using Operand = MatrixOperand<bfloat16>;
  using Memory::apply;
  using Memory::ask_for_next;
  using Memory::column;
  using Memory::column_tile;
  using Memory::common;
  using Memory::group;
  using Memory::in_vectors;
  using Memory::l;
  using Memory::lane;
  using Memory::load_elements;
  using Memory::load_right_delta;
  using Memory::load_vectors;
  using Memory::origin;
  using Memory::owned_end;
  using Memory::rotate;
  using Memory::row;
  using Memory::row_tile;
  using Memory::shared;
  using Memory::slot;
  using Memory::stage_gradient;
  using Memory::tile;
  using Memory::value;

 public:
  using Memory::Memory;

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
};

}  // namespace singd::cuda
