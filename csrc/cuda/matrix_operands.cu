// The operands of matrix_update's products (matrix_operands.h), from delta, N, S and the thin
// results in a layer's workspace. A warp makes an operand: a lane its eight elements, in all
// planes.
#include "matrix_layer.cuh"
#include "planes.cuh"

namespace singd::cuda {
namespace {

constexpr int kWarps = kStepThreads / kWarp;

template <class E>
struct OperandMaker {
  static constexpr int kPlanes = kComputePlanes<typename E::Stored>;
  const StepLayer& l;
  const MatrixOffsets operands;
  const StepOffsets offsets;
  float* const workspace;
  const int lane;

  __device__ explicit OperandMaker(const StepLayer& layer)
      : l(layer),
        operands(layer),
        offsets(layer),
        workspace(static_cast<float*>(layer.workspace)),
        lane(threadIdx.x % kWarp) {}

  __device__ __forceinline__ void make(int number) const {
#pragma unroll
    for (int array = 0; array < MatrixOffsets::kArrays; ++array) {
      if (number < operands.count[array]) {
        float* const to = workspace + offsets.size + operands.begin[array] +
                          int64_t{number} * kPlanes * kOperandFloats + lane * (kLaneBytes / 4);
        float values[8] = {};
        if (read(array, number, values)) put(to, values);
        return;
      }
      number -= operands.count[array];
    }
  }

 private:
  // The lane's values of an operand; false if its step is beyond the range.
  __device__ __forceinline__ bool read(int array, int number, float (&values)[8]) const {
    switch (array) {
      case MatrixOffsets::kLeftZ:
        return left(number, true, values, [&](int64_t i, int64_t t) { return left_z(i, t); });
      case MatrixOffsets::kRightZ:
        return right(number, true, values,
                     [&](int64_t t, int64_t j) { return factor(true, j, t); });
      case MatrixOffsets::kLeftP:
        return left(number, false, values,
                    [&](int64_t i, int64_t t) { return factor(false, i, t); });
      default:
        return right(number, false, values, [&](int64_t t, int64_t j) { return right_p(t, j); });
    }
  }

  __device__ __forceinline__ const SideShape& side_of(bool z) const { return z ? l.right : l.left; }

  // value(i, t) for row i of W, and the t's of the operand.
  template <class Value>
  __device__ __forceinline__ bool left(int number, bool z, float (&values)[8],
                                       Value&& value) const {
    const SideShape& side = side_of(z);
    const int steps = z ? operands.steps_z : operands.steps_p;
    const int step = number % steps;
    number /= steps;
    const int first = number % operands.groups * kMatrixSide;
    const int64_t tile_row = int64_t{number / operands.groups} * l.tile_rows;
    const int rows = static_cast<int>(min(int64_t{l.tile_rows}, l.rows - tile_row));
    const Steps range = StepRanges(side).of(0, rows, first, kMatrixSide);
    const int64_t origin = side.action == Action::kBlocks ? tile_row : 0;  // of t
    if (range.begin + step >= range.end) return false;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = first + matrix_row(lane, e);
      const int t = (range.begin + step) * kMatrixSide + matrix_column(lane, e);
      if (i < rows) values[e] = value(tile_row + i, origin + t);
    }
    return true;
  }

  // value(t, j) for column j of W, and the t's of the operand.
  template <class Value>
  __device__ __forceinline__ bool right(int number, bool z, float (&values)[8],
                                        Value&& value) const {
    const SideShape& side = side_of(z);
    const int steps = z ? operands.steps_z : operands.steps_p;
    const int half = number % 2;
    number /= 2;
    const int step = number % steps;
    number /= steps;
    const int first = number % operands.units * kUnitColumns;
    const int64_t column = int64_t{number / operands.units} * l.tile_columns;
    const int owned = static_cast<int>(min(int64_t{l.tile_columns}, l.columns - column));
    const int64_t base = column / E::kCount * E::kCount;
    const int origin = static_cast<int>(column - base);
    const Steps range = StepRanges(side).of(origin, owned, first, kUnitColumns);
    const int64_t first_t = side.action == Action::kBlocks ? base : 0;
    if (range.begin + step >= range.end) return false;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int j = first + unit_column(half, lane / 4 + e / 4 * 8);
      const int t = (range.begin + step) * kMatrixSide + lane % 4 * 2 + e % 2 + e / 2 % 2 * 8;
      if (j >= origin && j < origin + owned) {
        values[e] = value(first_t + t, base + j);
      }
    }
    return true;
  }

  // What index `own` of a side takes of index t of it, or of row t of its border.
  __device__ __forceinline__ float factor(bool z, int64_t own, int64_t t) const {
    const SideShape& side = side_of(z);
    const int64_t dim = z ? l.columns : l.rows;
    if (side.action == Action::kBlocks) t -= own / side.width * side.width;
    if (t < 0 || t >= side.width) return 0;
    const int64_t n = z ? offsets.right_n : offsets.left_n;
    return load(workspace + n + t * padded(dim) + own);
  }

  __device__ __forceinline__ float left_z(int64_t i, int64_t t) const {
    const SideShape& side = l.right;
    if (t >= side.width) return 0;
    if (side.action == Action::kRowBordered) {
      return load_gradient<E>(l, i, static_cast<int>(side.border_index(t, l.columns)));
    }
    return load(workspace + offsets.products + i * side.width + t);
  }

  __device__ __forceinline__ float right_p(int64_t t, int64_t j) const {
    const int width = l.left.width;
    if (t >= width) return 0;
    const int64_t row = l.left.action == Action::kRowBordered ? width + t : t;
    return load(workspace + offsets.thin_result + row * padded(l.columns) + j);
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

using OperandTable = Table<StepLayer, kMaxStepLayers>;

template <class E>
__global__ void __launch_bounds__(kStepThreads)
    matrix_operands_kernel(const __grid_constant__ OperandTable table, const StepArguments a) {
  const StepLayer& l = table.find(blockIdx.x);
  if (blockIdx.x == l.first_block && threadIdx.x == 0) write_tile_layer(a, l);
  const OperandMaker<E> maker(l);
  const int number = static_cast<int>(blockIdx.x - l.first_block) * kWarps + threadIdx.x / kWarp;
  if (number < maker.operands.operands()) maker.make(number);
}

}  // namespace

void matrix_operands(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                     Stream stream) {
  OperandTable table;
  const int64_t blocks = fill(table, layers, count, [](const StepLayer& l) {
    return (MatrixOffsets(l).operands() + kWarps - 1) / kWarps;
  });
  dispatch_vectors(kind, [&](auto elements) {
    launch({"matrix_operands", blocks, kStepThreads, stream},
           matrix_operands_kernel<decltype(elements)>, table, a);
  });
}

}  // namespace singd::cuda
