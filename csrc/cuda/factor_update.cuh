// What the kernels of update_factors_ share: the list of factors as a kernel argument, the arrays
// of a factor, and sums over a block.
#pragma once

#include <memory>

#include "factor_update.h"
#include "launch.cuh"
#include "numeric.cuh"
#include "pattern_product.cuh"
#include "table.cuh"

namespace singd::cuda {

constexpr int kFactorThreads = 256;
constexpr int kFactorWarps = kFactorThreads / kWarp;
// Entries of a block: one a thread where an entry is a sum, more where it is only read and written.
constexpr int64_t kSumEntries = kFactorThreads;
constexpr int64_t kPlainEntries = 4 * kFactorThreads;

using FactorTable = Table<FactorItem, 2 * kMaxLayers>;

// Blocks of a stage for one factor.
inline int64_t plain_blocks(const FactorItem& item) {
  return (item.size + kPlainEntries - 1) / kPlainEntries;
}
inline int64_t sum_blocks(const FactorItem& item) {
  return (item.size + kSumEntries - 1) / kSumEntries;
}
inline int64_t one_block(const FactorItem&) { return 1; }

// The arrays of a factor (FactorItem).
template <class T>
struct FactorArrays {
  T *v, *h, *g;
  const T* k;
  T* copy;
  PartialNorms* norms;
};
template <class T>
__device__ __forceinline__ FactorArrays<T> arrays_of(const FactorItem& item) {
  const int64_t stride = array_stride(item.size);
  T* const v = static_cast<T*>(item.arrays);
  T* const end = v + kFactorArrays * stride;
  return {v,
          v + stride,
          v + 2 * stride,
          item.copied ? end : static_cast<const T*>(item.state),
          end,
          reinterpret_cast<PartialNorms*>(item.copied ? end + stride : end)};
}

// f(slot) for the thread's slots of a block of `kEntries` slots.
template <int64_t kEntries, class Function>
__device__ __forceinline__ void for_each_slot(const FactorItem& item, Function f) {
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - item.first_block) * kEntries;
#pragma unroll
  for (int64_t n = 0; n < kEntries; n += kFactorThreads) {
    const int64_t slot = begin + n + threadIdx.x;
    if (slot < item.size) f(slot);
  }
}

// The sum, or the largest, of the block's values, in a fixed order; for thread 0.
template <bool kSum>
__device__ __forceinline__ double combine(double a, double b) {
  return kSum ? a + b : (b > a ? b : a);
}
template <bool kSum>
__device__ double reduce_factor_block(double value) {
  __shared__ double of_warp[kFactorWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine<kSum>(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  __syncthreads();  // of_warp may still be read by thread 0 for the value before
  if (threadIdx.x % kWarp == 0) shared_store(of_warp + threadIdx.x / kWarp, value);
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kFactorWarps; ++w) value = combine<kSum>(value, shared_load(of_warp + w));
  }
  return value;
}

// Launches a stage for the factors of one type: blocks_of(item) blocks for each.
template <class BlocksOf, class... Parameters, class... Arguments>
void launch_stage(const char* name, const std::vector<FactorItem>& items, Stream stream,
                  BlocksOf blocks_of, void (*kernel)(const FactorTable, Parameters...),
                  const Arguments&... arguments) {
  const auto table = std::make_unique<FactorTable>();
  int64_t blocks = 0;
  for (const FactorItem& item : items) {
    FactorItem& entry = table->items[table->count++];
    entry = item;
    entry.first_block = blocks;
    blocks += blocks_of(item);
  }
  launch({name, blocks, kFactorThreads, stream}, kernel, *table, arguments...);
}

// Both instantiations of a stage, each for the factors of its type.
template <class BlocksOf, class Single, class Twice, class... Arguments>
void launch_both(const char* name, const FactorList& list, BlocksOf blocks_of, Single single,
                 Twice twice, const Arguments&... arguments) {
  launch_stage(name, list.single, list.stream, blocks_of, single, arguments...);
  launch_stage(name, list.twice, list.stream, blocks_of, twice, arguments...);
}

}  // namespace singd::cuda
