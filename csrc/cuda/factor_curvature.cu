// The first half of update_factors_: H = Pi(K^T U K) times its scale, G = Pi(K^T K) and their
// traces, for all factors of a list.
//
//   copy_factors        K in the type T where it has another one; reads and writes size numbers
//   first_products      V = U K of the structures whose statistic is one of U (a thread an entry,
//                       pattern_product.cuh); of column-bordered factors, the core of K K^T (a warp
//                       an entry)
//   curvature_and_gram  H from V, or from a statistic that is H but for weights; G from K
//   traces              a block a factor
//
// A block owns 256 or 1024 neighbouring entries of a factor. Operands of the products come from L1
// and L2; DRAM traffic is one read of each array that a stage takes and one write of its result.
#include "factor_update.cuh"

namespace singd::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    copy_kernel(const __grid_constant__ FactorTable table) {
  const FactorItem& item = table.find(blockIdx.x);
  T* const to = arrays_of<T>(item).copy;
  for_each_slot<kPlainEntries>(item, [&](int64_t slot) {
    store(to + slot, load_as<T>(item.state, static_cast<Dtype>(item.state_dtype), slot));
  });
}

bool has_statistic_of_u(const FactorItem& item) {
  const Layout layout = item.layout();
  return !layout.transposed && layout.family != Family::kDense &&
         layout.family != Family::kToeplitz;
}

template <class T, class Pattern>
__device__ T first_product(const Pattern& p, const T* u, const T* k, int64_t i, int64_t j) {
  return symmetric_product(p, u, k, i, j);
}
template <class T>
__device__ T first_product(const ToeplitzPattern&, const T*, const T*, int64_t, int64_t) {
  return 0;  // not called: its statistic is one of H
}

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    first_products_kernel(const __grid_constant__ FactorTable table) {
  const FactorItem& item = table.find(blockIdx.x);
  const Layout layout = item.layout();
  const FactorArrays<T> arrays = arrays_of<T>(item);
  if (layout.transposed) {
    core_gram_of_block(layout, blockIdx.x - item.first_block, arrays.k, arrays.g);
    return;
  }
  const T* const u = static_cast<const T*>(item.statistic);
  for_each_slot<kSumEntries>(item, [&](int64_t slot) {
    T value = 0;
    with_entry(layout, slot, [&](const auto& pattern, int64_t base, int64_t i, int64_t j) {
      value = first_product(pattern, u + base, arrays.k + base, i, j);
    });
    store(arrays.v + slot, value);
  });
}

// H at an entry, unscaled. Statistics of H itself want weights; Toeplitz ones are sums over
// diagonals.
template <class T, class Pattern>
__device__ T curvature(const FactorItem& item, const Layout& layout, const FactorArrays<T>& arrays,
                       const Pattern& p, int64_t base, int64_t i, int64_t j) {
  const T* const statistic = static_cast<const T*>(item.statistic) + base;
  const T weight = static_cast<T>(p.weight(i, j));
  const bool is_h = layout.transposed || layout.family == Family::kDense;
  if (is_h) return weight * load(statistic + p.slot(i, j));
  if (item.wide) return load(arrays.h + base + p.slot(i, j));
  return weight * transposed_product(p, arrays.k + base, arrays.v + base, i, j);
}
template <class T>
__device__ T curvature(const FactorItem& item, const Layout&, const FactorArrays<T>&,
                       const ToeplitzPattern& p, int64_t, int64_t, int64_t j) {
  const T sum = load(static_cast<const T*>(item.statistic) + j);
  return static_cast<T>(toeplitz_average(sum, p.dim, j));
}

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    curvature_and_gram_kernel(const __grid_constant__ FactorTable table,
                              const __grid_constant__ FactorOptions options) {
  const FactorItem& item = table.find(blockIdx.x);
  const Layout layout = item.layout();
  const FactorArrays<T> arrays = arrays_of<T>(item);
  for_each_slot<kSumEntries>(item, [&](int64_t slot) {
    T h = 0, g = 0;
    with_entry(layout, slot, [&](const auto& pattern, int64_t base, int64_t i, int64_t j) {
      h = curvature(item, layout, arrays, pattern, base, i, j);
      g = item.wide ? static_cast<T>(pattern.weight(i, j)) * load(arrays.g + slot)
                    : gram(layout, pattern, arrays.k + base, arrays.g + base, i, j);
    });
    const double unscale = item.id % 2 == 0 ? 1.0 : 1.0 / read(options.grad_scale);
    store(arrays.h + slot, static_cast<T>(h * (item.scale * unscale * unscale)));
    store(arrays.g + slot, g);
  });
}

__device__ __forceinline__ int64_t diagonal_slot(const Layout& layout, int64_t i) {
  switch (layout.family) {
    case Family::kDiagonal:
    case Family::kBlockDiagonal:
      return BlockPattern(layout).slot(i, i);
    case Family::kBordered:
      return BorderedPattern(layout).slot(i, i);
    case Family::kToeplitz:
      return 0;
    default:
      return DensePattern(layout).slot(i, i);
  }
}

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    traces_kernel(const __grid_constant__ FactorTable table,
                  const __grid_constant__ FactorOptions options) {
  const FactorItem& item = table.find(blockIdx.x);
  const Layout layout = item.layout();
  const FactorArrays<T> arrays = arrays_of<T>(item);
  double h = 0, g = 0;
  for (int64_t i = threadIdx.x; i < layout.dim; i += kFactorThreads) {
    const int64_t slot = diagonal_slot(layout, i);
    h += static_cast<double>(load(arrays.h + slot));
    g += static_cast<double>(load(arrays.g + slot));
  }
  h = reduce_factor_block<true>(h);
  g = reduce_factor_block<true>(g);
  if (threadIdx.x != 0) return;
  FactorResult* const result = options.results + item.id;
  store(&result->mean_trace_h, h / static_cast<double>(layout.dim));
  store(&result->mean_trace_gram, g / static_cast<double>(layout.dim));
  store(&result->rejected, 0);
}

int64_t copy_blocks(const FactorItem& item) { return item.copied ? plain_blocks(item) : 0; }

int64_t first_blocks(const FactorItem& item) {
  if (item.wide) return 0;
  return has_statistic_of_u(item) ? sum_blocks(item) : core_blocks(item.layout(), kFactorThreads);
}

}  // namespace

void copy_factors(const FactorList& list) {
  launch_both("update_factors_copy", list, copy_blocks, copy_kernel<float>, copy_kernel<double>);
}

void first_products(const FactorList& list) {
  launch_both("update_factors_first_products", list, first_blocks, first_products_kernel<float>,
              first_products_kernel<double>);
}

void curvature_and_gram(const FactorList& list) {
  launch_both("update_factors_curvature", list, sum_blocks, curvature_and_gram_kernel<float>,
              curvature_and_gram_kernel<double>, list.options);
}

void traces_of_factors(const FactorList& list) {
  launch_both("update_factors_traces", list, one_block, traces_kernel<float>, traces_kernel<double>,
              list.options);
}

}  // namespace singd::cuda
