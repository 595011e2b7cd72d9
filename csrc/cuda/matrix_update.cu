// The fused step of layers with a block-diagonal or bordered side on the tensor cores, for float32
// and 16-bit layers that move in vectors:
//
//   Z = G A_K    P = A_C Z    M <- alpha2 M + P + gamma W    W <- W - lr M
//
// A tile (matrix_tile.cuh) is whole blocks of C high and whole blocks of K wide. Numbers are split
// into planes of bfloat16 (planes.cuh): 16-bit layers are computed to about 2^-16, float32 ones to
// 2^-24.
//
// Bytes: G, M, W read once and M, W written once (5 passes over DRAM): the same launch inspects G
// before, and reads it again from L2.
#include "matrix_tile.cuh"
#include "step_work.cuh"

namespace singd::cuda {
namespace {

constexpr int kTilesPerInspection = 2;

template <class E>
__device__ __forceinline__ void update_tile(const StepArguments& a, const StepLayer& l,
                                            const Tile& tile) {
  TileUpdate<E> t(l, tile);
  t.stage();
  __syncthreads();
  MatrixSums p[TileShape<E>::kRowTiles];
  t.multiply(p);
  __syncthreads();
  t.store_result(p);
  __syncthreads();
  const Update<float> update(a, l);
  for_each_vector<E>(tile, [&](int row, const Columns& c) {
    const float* const from = t.result_row(row) + c.j - tile.base;
    float values[E::kCount];
#pragma unroll
    for (int e = 0; e < E::kCount; ++e) values[e] = shared_load(from + e);
    update_vector<E>(l, update, tile.row + row, c, values);
  });
}

template <class E>
__global__ void __launch_bounds__(kStepThreads, 2)
    matrix_update_kernel(const __grid_constant__ StepTable table, const StepArguments a,
                         int* ticket) {
  const Work work = work_of(table, take_ticket(ticket));
  const StepLayer& l = *work.layer;
  if (!work.first) {
    if (begin_update<float>(a, work)) update_tile<E>(a, l, tile_of<E>(l, work.tile));
    return;
  }
  const int64_t begin = work.tile * kTilesPerInspection;
  for (int64_t n = begin; n < min(begin + kTilesPerInspection, l.tiles()); ++n) {
    inspect<E>(a, l, tile_of<E>(l, n));
  }
  finish_first_tile(a, l);
}

// Columns of a tile: whole blocks, if possible whole vectors; 0 if not one block fits.
int64_t tile_columns(const StepLayer& l, int64_t vector) {
  if (l.right.action != Action::kBlocks) return std::min<int64_t>(kTileColumns, padded(l.columns));
  const int64_t width = l.right.width;
  int64_t unit = width;
  while (unit % vector != 0 && unit <= kTileColumns) unit += width;
  if (unit <= kTileColumns) return kTileColumns / unit * unit;
  return (kTileColumns - (vector - 1)) / width * width;
}

}  // namespace

bool fits_matrix_update(const StepLayer& layer, const StepKind& kind) {
  constexpr int64_t kSector = 32;
  if (!kind.in_vectors || kind.element == Dtype::kFloat64) return false;
  const int64_t bytes = size_of(kind.element), columns = tile_columns(layer, 16 / bytes);
  return columns >= layer.columns || columns * bytes % kSector == 0;
}

void plan_matrix_update(StepLayer& layer, const StepKind& kind) {
  dispatch_vectors(kind, [&](auto elements) {
    using E = decltype(elements);
    const bool blocks = layer.left.action == Action::kBlocks;
    const int width = blocks ? layer.left.width : 1;
    layer.tile_columns = static_cast<int16_t>(tile_columns(layer, E::kCount));
    layer.tile_rows = static_cast<int16_t>(TileShape<E>::kRows / width * width);
  });
  if (layer.left.bordered() || layer.right.bordered()) return;
  layer.first_tiles =
      static_cast<int32_t>((layer.tiles() + kTilesPerInspection - 1) / kTilesPerInspection);
}

void matrix_update(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                   int* ticket, Stream stream) {
  StepTable table;
  const int64_t blocks = fill_work(table, layers, count);
  dispatch_vectors(kind, [&](auto elements) {
    using E = decltype(elements);
    size_t bytes = 0;
    for (int n = 0; n < count; ++n) bytes = std::max(bytes, TileOperands<E>(layers[n]).bytes());
    launch({"matrix_update", blocks, kStepThreads, stream, bytes}, matrix_update_kernel<E>, table,
           a, ticket);
  });
}

}  // namespace singd::cuda
