// The thin rows X and G_B of layers with a bordered C, times A_K (preconditioned_update.h):
//
//   thin_result = [X; G_B] A_K, with thin_products = [X; G_B] N_K^T where K is bordered, too
//
// Bytes: the thin rows read once and written once, and N_K for every 16 of them; they come from L2.
// A thread owns 16 rows of a column; what a bordered K takes of these rows is the same for all
// columns, and lies in shared memory.
#include "step.cuh"

namespace singd::cuda {
namespace {

constexpr int kRows = 16;

using ThinTable = Table<StepLayer, kMaxStepLayers>;

SINGD_HOST_DEVICE int blocks_across(const StepLayer& l) {
  return (l.columns + kStepThreads - 1) / kStepThreads;
}
SINGD_HOST_DEVICE int64_t block_count(const StepLayer& l) {
  return int64_t{(l.thin_rows() + kRows - 1) / kRows} * blocks_across(l);
}

// Columns of rows `first` ... of the thin matrices.
template <class T>
class ThinResult {
 public:
  using Word = Vec<T, kVector<T>>;
  static constexpr int kWords = kRows / kVector<T>;
  using Border = Word[kMaxSideWidth][kWords];  // [t][row]

  __device__ ThinResult(const StepLayer& layer, int first_row)
      : l(layer),
        offsets(layer),
        workspace(static_cast<T*>(layer.workspace)),
        pitch(padded(layer.columns)),
        first(first_row),
        rows(min(kRows, layer.thin_rows() - first_row)) {}

  // What a bordered K takes of the rows: S, or their border columns.
  __device__ __forceinline__ void stage(Border& border) const {
    const int width = l.right.width;
    for (int at = threadIdx.x; at < width * kRows; at += kStepThreads) {
      const int row = at / width, t = at - row * width;
      T x = 0;
      if (row < rows) {
        x = l.right.action == Action::kRowBordered
                ? value(row, static_cast<int>(l.right.border_index(t, l.columns)))
                : product(row, t);
      }
      shared_store(&border[t][row / kVector<T>][row % kVector<T>], x);
    }
  }

  __device__ __forceinline__ void run(int j, const Border& border) const {
    T* const result = workspace + offsets.thin_result + first * pitch + j;
    if (l.right.action == Action::kRowBordered && l.right.is_border(j, l.columns)) {
      const int r = static_cast<int>(l.right.border_row(j, l.columns));
#pragma unroll 1
      for (int e = 0; e < rows; ++e) store(result + e * pitch, product(e, r));
      return;
    }
    T sums[kRows] = {};
    if (l.right.action == Action::kBlocks) {
      add_block(j, sums);
    } else {
      const T delta = load(workspace + offsets.right_delta + j);
#pragma unroll
      for (int e = 0; e < kRows; ++e) {
        if (e < rows) sums[e] = delta * value(e, j);
      }
    }
    if (l.right.bordered()) add_border(j, border, sums);
#pragma unroll
    for (int e = 0; e < kRows; ++e) {
      if (e < rows) store(result + e * pitch, sums[e]);
    }
  }

 private:
  const StepLayer& l;
  const StepOffsets offsets;
  T* const workspace;
  const int64_t pitch;
  const int first, rows;

  __device__ __forceinline__ T value(int row, int j) const {
    return load(workspace + offsets.thin + (first + row) * pitch + j);
  }
  __device__ __forceinline__ T factor(int t, int j) const {
    return load(workspace + offsets.right_n + t * pitch + j);
  }
  // Of row and row t of K's border: the sum of the parts that thin_row_products has left.
  __device__ __forceinline__ T product(int row, int t) const {
    const int64_t size = int64_t{l.thin_rows()} * l.right.width;
    const T* part = workspace + offsets.thin_products + (first + row) * l.right.width + t;
    T sum = load(part);
#pragma unroll 4
    for (int n = 1; n < l.thin_splits(); ++n) sum += load(part + n * size);
    return sum;
  }

  __device__ __forceinline__ void add_border(int j, const Border& border, T (&sums)[kRows]) const {
#pragma unroll 4
    for (int t = 0; t < l.right.width; ++t) {
      const T n = factor(t, j);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const Word x = shared_load(&border[t][w]);
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) sums[w * kVector<T> + e] += n * x[e];
      }
    }
  }

  __device__ __forceinline__ void add_block(int j, T (&sums)[kRows]) const {
    const int start = j / l.right.width * l.right.width;
    const int count = min(static_cast<int>(l.right.width), l.columns - start);
    for (int t = 0; t < count; ++t) {
      const T n = factor(t, j);
#pragma unroll
      for (int e = 0; e < kRows; ++e) {
        if (e < rows) sums[e] += n * value(e, start + t);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    thin_results_kernel(const __grid_constant__ ThinTable table) {
  __shared__ typename ThinResult<T>::Border border;
  const StepLayer& l = table.find(blockIdx.x);
  const int number = static_cast<int>(blockIdx.x - l.first_block), across = blocks_across(l);
  const ThinResult<T> result(l, number / across * kRows);
  if (l.right.bordered()) result.stage(border);
  __syncthreads();
  const int j = number % across * kStepThreads + static_cast<int>(threadIdx.x);
  if (j < l.columns) result.run(j, border);
}

}  // namespace

void thin_results(StepLayer* layers, int count, Dtype compute, Stream stream) {
  ThinTable table;
  const int64_t blocks =
      fill(table, layers, count, [](const StepLayer& l) { return block_count(l); });
  const Launch where{"thin_results", blocks, kStepThreads, stream};
  if (compute == Dtype::kFloat64) {
    launch(where, thin_results_kernel<double>, table);
  } else {
    launch(where, thin_results_kernel<float>, table);
  }
}

}  // namespace singd::cuda
