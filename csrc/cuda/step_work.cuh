// The order in which the blocks of preconditioned_update_ take their work, what they wait for, and
// the decision whether a layer is updated.
#pragma once

#include "step.cuh"
#include "table.cuh"

namespace singd::cuda {

// The pieces of work of an update launch are the layers' first tiles and their updates, which wait
// for the first tiles. Blocks take them in this order: of every layer, the rest of its first tiles,
// then up to kLead first tiles of the next layer, then its own updates. So first tiles are done in
// good time, and G is still in L2 when it is read again.
constexpr int kLead = 128;

struct Work {
  const StepLayer* layer;
  bool first;    // a first tile, or an update
  int64_t tile;  // or group of tiles, in the order of memory: updates run backwards, from what is
                 // still in the cache
};

// The first item has no tiles; the launch begins with the lead of the layer after it.
using StepTable = Table<StepLayer, kMaxStepLayers + 1>;

SINGD_HOST_DEVICE inline int lead_of(const StepLayer& l) {
  return l.first_tiles < kLead ? l.first_tiles : kLead;
}

// Piece number n.
__device__ __forceinline__ Work work_of(const StepTable& table, int64_t n) {
  const StepLayer* const layer = &table.find(n);
  const StepLayer* const next = layer + 1;
  n -= layer->first_block;
  const int rest = layer->first_tiles - lead_of(*layer);
  if (n < rest) return {layer, true, lead_of(*layer) + n};
  n -= rest;
  const int lead = next < table.items + table.count ? lead_of(*next) : 0;
  if (n < lead) return {next, true, n};
  return {layer, false, layer->updates() - 1 - (n - lead)};
}

// Host: the table of an update launch, and its number of blocks.
inline int64_t fill_work(StepTable& table, StepLayer* layers, int count) {
  table.count = count + 1;
  table.items[0] = StepLayer{};
  for (int n = 0; n < count; ++n) table.items[n + 1] = layers[n];
  int64_t total = 0;
  for (int n = 0; n <= count; ++n) {
    StepLayer& l = table.items[n];
    l.first_block = total;
    total += l.first_tiles - lead_of(l);
    if (n < count) total += lead_of(table.items[n + 1]);
    if (n > 0) total += l.updates();
  }
  return total;
}

// The number of this block, in the order in which blocks start: those with lower numbers run or
// have run, so that waiting for them ends.
__device__ __forceinline__ int take_ticket(int* ticket) {
  __shared__ int number;
  if (threadIdx.x == 0) shared_store(&number, add_release(ticket, 1));
  __syncthreads();
  return shared_load(&number);
}

// After a first tile: its results are visible to the layer's updates.
__device__ __forceinline__ void finish_first_tile(const StepArguments& a, const StepLayer& l) {
  __syncthreads();
  if (threadIdx.x == 0) add_release(counters_of(a, l) + kFirstTilesFinished, 1);
}

// Whether the preconditioned gradient of a layer is finite, and all that leads to it: no entry of a
// product with A = K K^T is larger than the largest one before, times the largest row sum and the
// largest column sum of |K|. Sums below 1 count as 1, since they do not bound every intermediate;
// rounding is what the last factor is for.
template <class T>
__device__ __forceinline__ bool is_bounded(const int* counters, double unscale) {
  const auto at_least_1 = [](T x) { return x < T(1) ? T(1) : x; };  // keeps NaN
  T bound = from_magnitude<T>(load(counters + kGradientMagnitude)) *
            at_least_1(static_cast<T>(unscale < 0 ? -unscale : unscale));
#pragma unroll
  for (int sum = kRightRowSum; sum <= kLeftColumnSum; ++sum) {
    bound *= at_least_1(from_magnitude<T>(load(counters + sum)));
  }
  return is_finite(bound * T(16));
}

// Before an update: waits for the layer's first tiles; false if the layer is to stay as it is. One
// block of the layer writes what became of it.
template <class T>
__device__ __forceinline__ bool begin_update(const StepArguments& a, const Work& work) {
  __shared__ int proceeds;
  const StepLayer& l = *work.layer;
  if (threadIdx.x == 0) {
    const int* const counters = counters_of(a, l);
    wait_for(counters + kFirstTilesFinished, l.first_tiles);
    const bool stopped = read(a.found_inf) != 0;
    const bool bounded = is_bounded<T>(counters, 1.0 / read(a.grad_scale));
    if (work.tile == 0) {
      const bool skipped = !stopped && !bounded;
      store(a.outcomes + l.index, static_cast<int64_t>(skipped));
      if (skipped) store(l.skipped, load(l.skipped) + 1);
    }
    shared_store(&proceeds, static_cast<int>(!stopped && bounded));
  }
  __syncthreads();
  return shared_load(&proceeds) != 0;
}

// Asks for G, M and W of a tile: before an update waits, or while it writes another tile.
template <class E>
__device__ __forceinline__ void ask_for_tile(const StepLayer& l, const Tile& tile) {
  if constexpr (E::kCount > 1) {
    const Share share = share_of<E>(tile);
    if (!is_gradient_vector<E>(l, share.columns)) return;
    const Parameters<E> parameters(l);
    const auto* const gradient = static_cast<const typename E::Stored*>(l.gradient);
    const int64_t width = l.weight_columns(), pitch = l.gradient_pitch;
    for (int row = share.first_row; row < tile.rows; row += share.row_stride) {
      const int64_t i = tile.row + row, at = i * width + share.columns.j;
      prefetch(gradient + i * pitch + share.columns.j);
      prefetch(parameters.weight + at);
      if (parameters.momentum != nullptr) prefetch(parameters.momentum + at);
    }
  }
}

// max |G| of the vectors that a thread owns, several of which are on their way at a time.
template <class E>
__device__ __forceinline__ int inspect_vectors(const StepLayer& l, const Tile& tile,
                                               const Share& share) {
  if constexpr (E::kCount > 1) {
    constexpr int kAtOnce = 8;
    LargestMagnitude<typename E::Stored> largest;
    const int stride = share.row_stride, last = tile.rows - 1;
    for (int row = share.first_row; row < tile.rows; row += kAtOnce * stride) {
      Vec<typename E::Stored, E::kCount> g[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {  // beyond the tile, its last row again
        g[n] = gradient_vector<E>(l, tile.row + min(row + n * stride, last), share.columns);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) largest.add(g[n]);
    }
    return largest.key();
  }
  return 0;
}

// The first tile of a layer without borders: max |G|.
template <class E>
__device__ __forceinline__ void inspect(const StepArguments& a, const StepLayer& l,
                                        const Tile& tile) {
  const Share share = share_of<E>(tile);
  int key = 0;
  if (is_gradient_vector<E>(l, share.columns)) {
    key = inspect_vectors<E>(l, tile, share);
  } else {
    for (int row = share.first_row; row < tile.rows; row += share.row_stride) {
      typename E::Compute g[E::kCount];
      load_gradient<E, Cache::kNormal>(l, tile.row + row, share.columns, g);
#pragma unroll
      for (int e = 0; e < E::kCount; ++e) key = max(key, magnitude(g[e]));
    }
  }
  raise(counters_of(a, l) + kGradientMagnitude, key);
}

}  // namespace singd::cuda
