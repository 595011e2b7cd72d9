// The fused step of layers with a block-diagonal or bordered side that are float64, or of mixed
// dtypes, or not aligned, or whose blocks do not fit sectors (matrix_update.cu has the others):
//
//   Z = G A_K    P = A_C Z    M <- alpha2 M + P + gamma W    W <- W - lr M
//
// G, M, W: rows x columns; tile_product.cuh says how.
//
// Bytes: without borders, G, M, W read once and M, W written once (5 passes over DRAM): the same
// launch inspects G before, and reads it again from L2. With borders G is read again, and the thin
// matrices.
//
// A tile is whole blocks of C high, about 32 rows, and whole blocks of K wide, about 128 columns
// (64 for double), in shared memory.
#include "step_work.cuh"
#include "tile_product.cuh"

namespace singd::cuda {
namespace {

constexpr int kTileRows = 32;
constexpr int kTilesPerInspection = 2;

template <class E>
__device__ __forceinline__ void update_tile(const StepArguments& a, const StepLayer& l,
                                            const Tile& tile) {
  using T = typename E::Compute;
  const Stage<T> s(l, tile, l.tile_rows, E::kCount);
  const T* const products = s.workspace + s.offsets.products;
  const auto product = [&](int64_t i, int t) { return load(products + i * l.right.width + t); };
  for_each_vector<E>(tile, [&](int row, const Columns& c) {
    T g[E::kCount];
    load_gradient<E, Cache::kStreaming>(l, tile.row + row, c, g);
#pragma unroll
    for (int e = 0; e < E::kCount; ++e) {
      if (e >= c.begin && e < c.end) s.put(row, c.j + e, g[e]);
    }
  });
  if (l.right.bordered()) {
    stage_border(s, product, [&](int64_t i, int j) { return load_gradient<E>(l, i, j); });
  }
  if (s.has_left()) stage_left(s);
  __syncthreads();
  if (s.has_right()) {
    multiply_right(s, product);
    __syncthreads();
  }
  if (s.has_left()) {
    multiply_left(s);
    __syncthreads();
  }
  const Update<T> update(a, l);
  for_each_vector<E>(tile, [&](int row, const Columns& c) {
    const int64_t i = tile.row + row;
    const T* const from = (s.has_left() ? s.p_row(row) : s.z_row(row)) + c.j - tile.base;
    const T scale = s.has_left() ? T(1) : s.left_delta(i);
    T p[E::kCount];
#pragma unroll
    for (int e = 0; e < E::kCount; ++e) p[e] = scale * shared_load(from + e);
    update_vector<E>(l, update, i, c, p);
  });
}

template <class E>
__global__ void __launch_bounds__(kStepThreads, kResidentBlocks<typename E::Compute>)
    tiled_update_kernel(const __grid_constant__ StepTable table, const StepArguments a,
                        int* ticket) {
  const Work work = work_of(table, take_ticket(ticket));
  const StepLayer& l = *work.layer;
  if (!work.first) {
    if (begin_update<typename E::Compute>(a, work)) update_tile<E>(a, l, tile_of<E>(l, work.tile));
    return;
  }
  const int64_t begin = work.tile * kTilesPerInspection;
  for (int64_t n = begin; n < min(begin + kTilesPerInspection, l.tiles()); ++n) {
    inspect<E>(a, l, tile_of<E>(l, n));
  }
  finish_first_tile(a, l);
}

int64_t greatest_common_divisor(int64_t a, int64_t b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

// Whole blocks, and whole 16 elements where a tile does not become too wide.
int64_t tile_columns(const StepLayer& l, int64_t wanted) {
  int64_t unit = kRun;
  if (l.right.action == Action::kBlocks) {
    unit = l.right.width * (kRun / greatest_common_divisor(l.right.width, kRun));
    if (unit > 2 * wanted) unit = l.right.width;
  }
  const int64_t units = (l.columns + unit - 1) / unit;
  const int64_t most = std::max<int64_t>(1, wanted / unit);
  const int64_t tiles = (units + most - 1) / most;
  return unit * ((units + tiles - 1) / tiles);
}

}  // namespace

void plan_tiled_update(StepLayer& layer, const StepKind& kind) {
  const int64_t wanted = kind.compute == Dtype::kFloat64 ? 64 : 128;
  layer.tile_columns = static_cast<int16_t>(tile_columns(layer, wanted));
  const bool blocks = layer.left.action == Action::kBlocks;
  const int width = blocks ? layer.left.width : 1;
  layer.tile_rows = static_cast<int16_t>(std::max(1, kTileRows / width) * width);
  if (layer.left.bordered() || layer.right.bordered()) return;  // thin_products has inspected G
  layer.first_tiles =
      static_cast<int32_t>((layer.tiles() + kTilesPerInspection - 1) / kTilesPerInspection);
}

void tiled_update(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                  int* ticket, Stream stream) {
  StepTable table;
  const int64_t blocks = fill_work(table, layers, count);
  dispatch(kind, [&](auto elements) {
    using E = decltype(elements);
    constexpr int kBytes = sizeof(typename E::Compute);
    int size = 0;
    for (int n = 0; n < count; ++n) {
      size = std::max(size, TileArrays(layers[n], layers[n].tile_rows, E::kCount, kBytes).size);
    }
    launch({"tiled_update", blocks, kStepThreads, stream, static_cast<size_t>(size) * kBytes},
           tiled_update_kernel<E>, table, a, ticket);
  });
}

}  // namespace singd::cuda
