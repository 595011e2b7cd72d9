// The thin rows X and G_B of layers with a bordered C, times A_K (preconditioned_update.h):
//
//   thin_result = [X; G_B] A_K, with thin_products = [X; G_B] N_K^T where K is bordered, too
//
// Bytes: the thin rows read once and written once; they come from L2. A tile is 32 rows high and
// as wide as those of the update.
#include "step.cuh"
#include "tile_product.cuh"

namespace singd::cuda {
namespace {

constexpr int kThinTileRows = 32;

using ThinTable = Table<StepLayer, kMaxStepLayers>;

SINGD_HOST_DEVICE int64_t tile_count(const StepLayer& l) {
  return int64_t{(l.thin_rows() + kThinTileRows - 1) / kThinTileRows} * l.column_tiles();
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, kResidentBlocks<T>)
    thin_results_kernel(const __grid_constant__ ThinTable table) {
  const StepLayer& l = table.find(blockIdx.x);
  const int number = static_cast<int>(blockIdx.x - l.first_block), across = l.column_tiles();
  Tile tile;
  tile.row = number / across * kThinTileRows;
  tile.rows = min(kThinTileRows, l.thin_rows() - tile.row);
  tile.column = tile.base = number % across * l.tile_columns;
  tile.columns = min(static_cast<int>(l.tile_columns), l.columns - tile.column);
  const Stage<T> s(l, tile, kThinTileRows, 1);
  const int64_t pitch = padded(l.columns);
  const T* const thin = s.workspace + s.offsets.thin;
  const T* const products = s.workspace + s.offsets.thin_products;
  const auto product = [&](int64_t i, int t) {
    const T* const part = products + i * l.right.width + t;
    T sum = load(part);
    for (int n = 1; n < l.thin_splits(); ++n) {
      sum += load(part + static_cast<int64_t>(n) * l.thin_rows() * l.right.width);
    }
    return sum;
  };
  T* const result = s.workspace + s.offsets.thin_result;
  const auto value = [&](int64_t i, int j) { return load(thin + i * pitch + j); };
  const auto for_each = [&](auto f) {
    for (int at = threadIdx.x; at < tile.rows * tile.columns; at += kStepThreads) {
      f(at / tile.columns, tile.column + at % tile.columns);
    }
  };
  for_each([&](int row, int j) { s.put(row, j, value(tile.row + row, j)); });
  if (l.right.bordered()) stage_border(s, product, value);
  __syncthreads();
  if (s.has_right()) {
    multiply_right(s, product);
    __syncthreads();
  }
  for_each([&](int row, int j) {
    store(result + (tile.row + row) * pitch + j, shared_load(s.z_row(row) + j - tile.base));
  });
}

}  // namespace

void thin_results(StepLayer* layers, int count, Dtype compute, Stream stream) {
  ThinTable table;
  const int64_t blocks =
      fill(table, layers, count, [](const StepLayer& l) { return tile_count(l); });
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    int size = 0;
    for (int n = 0; n < count; ++n) {
      size = std::max(size, TileArrays(layers[n], kThinTileRows, 1, sizeof(T)).size);
    }
    launch({"thin_results", blocks, kStepThreads, stream, size * sizeof(T)}, thin_results_kernel<T>,
           table);
  };
  compute == Dtype::kFloat64 ? run(double{}) : run(float{});
}

}  // namespace singd::cuda
