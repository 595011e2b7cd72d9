// The fused step of layers with two diagonal sides, C C^T = diag(delta_C), K K^T = diag(delta_K):
//
//   M <- alpha2 M + delta_C[i] G[i, j] delta_K[j] + gamma W      W <- W - lr M
//
// G, M, W: rows x columns. Bytes: G, M, W read once and M, W written once from and to DRAM (5
// passes); G is read twice, the second time from L2. A tile of about 16384 elements a block, for
// the inspection of G and for the update alike; no shared memory beyond a few numbers.
#include "step_work.cuh"

namespace singd::cuda {
namespace {

constexpr int kTileColumns = 256;
constexpr int kTileElements = 16384;

// As many elements as an array has, from an address that is aligned like a vector of them.
template <class T, int kCount>
__device__ __forceinline__ void load_delta(const T* p, T (&delta)[kCount]) {
  constexpr int kPart = kCount < kVector<T> ? kCount : kVector<T>;
#pragma unroll
  for (int part = 0; part < kCount / kPart; ++part) {
    const auto values = load(reinterpret_cast<const Vec<T, kPart>*>(p) + part);
#pragma unroll
    for (int e = 0; e < kPart; ++e) delta[part * kPart + e] = values[e];
  }
}

// The update of a thread's vectors, rounded to nearest, while whole groups of them are left;
// returns the first row that is not done. G, M and W of a group are on their way at a time: what a
// multiprocessor has asked for has to cover the latency of memory.
template <class E>
__device__ __forceinline__ int update_vectors(const StepLayer& l,
                                              Update<typename E::Compute> update, const Tile& tile,
                                              const Share& share,
                                              const typename E::Compute (&delta)[E::kCount],
                                              const typename E::Compute* left) {
  int row = share.first_row;
  if constexpr (E::kCount > 1) {
    using T = typename E::Compute;
    using Stored = typename E::Stored;
    constexpr int kAtOnce = 4;
    if (update.key.enabled || !is_gradient_vector<E>(l, share.columns)) return row;
    update.key = RoundingKey{};  // what the compiler knows takes no registers
    const Parameters<E> parameters(l);
    const int64_t width = l.weight_columns(), pitch = l.gradient_pitch;
    const auto* const gradient = static_cast<const Stored*>(l.gradient) + share.columns.j;
    for (; row + (kAtOnce - 1) * share.row_stride < tile.rows; row += kAtOnce * share.row_stride) {
      Vec<Stored, E::kCount> g[kAtOnce];
      VectorUpdate<E> vectors[kAtOnce];
      T scale[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int64_t i = tile.row + row + n * share.row_stride;
        g[n] = load<Cache::kStreaming>(
            reinterpret_cast<const Vec<Stored, E::kCount>*>(gradient + i * pitch));
        vectors[n].load_from(parameters, i * width + share.columns.j);
        scale[n] = load(left + i);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int64_t i = tile.row + row + n * share.row_stride;
        T p[E::kCount];
#pragma unroll
        for (int e = 0; e < E::kCount; ++e) p[e] = widen<T>(g[n][e]) * (scale[n] * delta[e]);
        vectors[n].apply(parameters, update, i * width + share.columns.j, p);
      }
    }
  }
  return row;
}

template <class E>
__global__ void __launch_bounds__(kStepThreads, 2)
    stream_update_kernel(const __grid_constant__ StepTable table, const StepArguments a,
                         int* ticket) {
  using T = typename E::Compute;
  const Work work = work_of(table, take_ticket(ticket));
  const StepLayer& l = *work.layer;
  const Tile tile = tile_of<E>(l, work.tile);
  if (work.first) {
    inspect<E>(a, l, tile);
    return finish_first_tile(a, l);
  }
  ask_for_tile<E>(l, tile);
  if (!begin_update<T>(a, work)) return;
  const Update<T> update(a, l);
  const StepOffsets offsets(l);
  const T* const right = static_cast<const T*>(l.workspace) + offsets.right_delta;
  const T* const left = static_cast<const T*>(l.workspace) + offsets.left_delta;
  const Share share = share_of<E>(tile);
  T delta[E::kCount];
  load_delta(right + share.columns.j, delta);
  int row = update_vectors<E>(l, update, tile, share, delta, left);
  for (; row < tile.rows; row += share.row_stride) {
    const int64_t i = tile.row + row;
    T p[E::kCount];
    load_gradient<E, Cache::kStreaming>(l, i, share.columns, p);
    const T scale = load(left + i);
#pragma unroll
    for (int e = 0; e < E::kCount; ++e) p[e] *= scale * delta[e];
    update_vector<E>(l, update, i, share.columns, p);
  }
}

}  // namespace

void plan_stream_update(StepLayer& layer) {
  const int64_t across = (layer.columns + kTileColumns - 1) / kTileColumns;
  layer.tile_columns = static_cast<int16_t>(padded((layer.columns + across - 1) / across));
  layer.tile_rows = static_cast<int16_t>(
      std::min<int64_t>(std::max(1, kTileElements / layer.tile_columns), layer.rows));
  layer.first_tiles = static_cast<int32_t>(layer.tiles());
}

void stream_update(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                   int* ticket, Stream stream) {
  StepTable table;
  const int64_t blocks = fill_work(table, layers, count);
  dispatch(kind, [&](auto elements) {
    launch({"stream_update", blocks, kStepThreads, stream},
           stream_update_kernel<decltype(elements)>, table, a, ticket);
  });
}

}  // namespace singd::cuda
