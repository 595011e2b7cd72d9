// The second half of update_factors_, from H, G, their traces and the step sizes that
// factor_norms.cu finds, for all factors of a list:
//
//   momenta        m = alpha1 m + s/2 (tr(H_partner)/d_partner H + lambda tr(G_partner)/d_partner G
//                  - I), over H; the stored m is not changed yet
//   first_order    -beta m
//   second_order   E = -beta m + (beta m)^2 / 2
//   candidates     K + K E, rounded to K's type
//   commit         K and m of every layer whose four candidates are finite, its outcome, and the
//                  count of rejected layers
//
// A block owns 256 entries of a factor where an entry is a sum (pattern_product.cuh), 1024 where it
// is only read and written; these stages read and write every array that they take once.
#include "factor_update.cuh"

namespace singd::cuda {
namespace {

// `value` as store_as would leave it.
template <class T>
__device__ __forceinline__ T round_as(Dtype dtype, T value, const RoundingKey& key, int64_t index) {
  switch (dtype) {
    case Dtype::kFloat64:
      return value;
    case Dtype::kFloat32:
      return static_cast<T>(static_cast<float>(value));
    case Dtype::kBFloat16:
      return widen<T>(narrow<bfloat16>(value, key, index));
    default:
      return widen<T>(narrow<float16>(value));
  }
}

// Candidates have to be finite as float32.
template <class T>
__device__ __forceinline__ void reject_unless_finite(const FactorOptions& options,
                                                     const FactorItem& item, T value) {
  if (!is_finite(static_cast<float>(value))) store(&options.results[item.id].rejected, 1);
}

// The random bits of one tensor: `tensor` is 0 for K, 1 for m_K.
__device__ __forceinline__ RoundingKey key_of(const FactorOptions& options, const FactorItem& item,
                                              int tensor) {
  return options.rounding.stream(static_cast<uint64_t>(options.first_layer + item.id / 2))
      .stream(item.id % 2)
      .stream(static_cast<uint64_t>(tensor));
}

__device__ __forceinline__ bool is_diagonal(const Layout& layout, int64_t slot) {
  bool diagonal = false;
  with_entry(layout, slot, [&](const auto&, int64_t, int64_t i, int64_t j) { diagonal = i == j; });
  return diagonal;
}

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    momenta_kernel(const __grid_constant__ FactorTable table,
                   const __grid_constant__ FactorOptions options) {
  const FactorItem& item = table.find(blockIdx.x);
  const Layout layout = item.layout();
  const FactorArrays<T> arrays = arrays_of<T>(item);
  const FactorResult* const partner = options.results + (item.id ^ 1);
  const double h_scale = options.kfac_like ? 1.0 : load(&partner->mean_trace_h);
  const double gram_scale =
      options.damping * (options.kfac_like ? 1.0 : load(&partner->mean_trace_gram));
  const double s = 0.5 * (options.normalize_lr_cov ? 1.0 - options.alpha1 : 1.0);
  const Dtype dtype = static_cast<Dtype>(item.momentum_dtype);
  const RoundingKey key = key_of(options, item, 1);
  for_each_slot<kPlainEntries>(item, [&](int64_t slot) {
    T m =
        static_cast<T>(s * (h_scale * load(arrays.h + slot) + gram_scale * load(arrays.g + slot)));
    if (is_diagonal(layout, slot)) m += static_cast<T>(-s);
    if (item.momentum != nullptr) {
      m += static_cast<T>(options.alpha1 * load_as<T>(item.momentum, dtype, slot));
    }
    store(arrays.h + slot, m);
    reject_unless_finite(options, item, round_as(dtype, m, key, slot));
  });
}

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    first_order_kernel(const __grid_constant__ FactorTable table,
                       const __grid_constant__ FactorOptions options) {
  const FactorItem& item = table.find(blockIdx.x);
  const FactorArrays<T> arrays = arrays_of<T>(item);
  T* const to = options.second_order ? arrays.v : arrays.g;
  const double beta = load(&options.results[item.id].beta);
  for_each_slot<kPlainEntries>(
      item, [&](int64_t slot) { store(to + slot, static_cast<T>(-beta * load(arrays.h + slot))); });
}

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    second_order_kernel(const __grid_constant__ FactorTable table) {
  const FactorItem& item = table.find(blockIdx.x);
  const Layout layout = item.layout();
  const FactorArrays<T> arrays = arrays_of<T>(item);
  for_each_slot<kSumEntries>(item, [&](int64_t slot) {
    const T square = product_at<T>(layout, arrays.v, arrays.v, slot);
    store(arrays.g + slot, load(arrays.v + slot) + square / 2);
  });
}

// Candidates are kept in the type T, which holds every number of K's type that a T rounds to.
template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    candidates_kernel(const __grid_constant__ FactorTable table,
                      const __grid_constant__ FactorOptions options) {
  const FactorItem& item = table.find(blockIdx.x);
  const Layout layout = item.layout();
  const FactorArrays<T> arrays = arrays_of<T>(item);
  for_each_slot<kSumEntries>(item, [&](int64_t slot) {
    const T change =
        item.wide ? load(arrays.v + slot) : product_at<T>(layout, arrays.k, arrays.g, slot);
    const T value = round_as(static_cast<Dtype>(item.state_dtype), load(arrays.k + slot) + change,
                             key_of(options, item, 0), slot);
    store(arrays.v + slot, value);
    reject_unless_finite(options, item, value);
  });
}

struct Rejections {
  int64_t* count[kMaxLayers];
};

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    commit_kernel(const __grid_constant__ FactorTable table,
                  const __grid_constant__ FactorOptions options,
                  const __grid_constant__ Rejections rejections) {
  const FactorItem& item = table.find(blockIdx.x);
  const FactorArrays<T> arrays = arrays_of<T>(item);
  const FactorResult *const own = options.results + item.id, *const partner =
                                                                 options.results + (item.id ^ 1);
  const bool skipped = read(options.found_inf) != 0;
  const bool rejected = load(&own->rejected) != 0 || load(&partner->rejected) != 0;
  if (item.id % 2 == 0 && blockIdx.x == item.first_block && threadIdx.x == 0) {
    const int layer = item.id / 2;
    const bool capped = load(&own->capped) != 0 || load(&partner->capped) != 0;
    store(options.outcomes + options.first_layer + layer, static_cast<int64_t>(skipped    ? 0
                                                                               : rejected ? 1
                                                                               : capped   ? 2
                                                                                          : 0));
    int64_t* const count = rejections.count[layer];
    if (!skipped && rejected) store(count, load(count) + 1);
  }
  if (skipped || rejected) return;
  const RoundingKey key = key_of(options, item, 1);
  for_each_slot<kPlainEntries>(item, [&](int64_t slot) {
    store_as(item.state, static_cast<Dtype>(item.state_dtype), slot, load(arrays.v + slot), {});
    if (item.momentum != nullptr) {
      store_as(item.momentum, static_cast<Dtype>(item.momentum_dtype), slot, load(arrays.h + slot),
               key);
    }
  });
}

int64_t narrow_sum_blocks(const FactorItem& item) { return item.wide ? 0 : sum_blocks(item); }

}  // namespace

void momenta_of_factors(const FactorList& list) {
  launch_both("update_factors_momenta", list, plain_blocks, momenta_kernel<float>,
              momenta_kernel<double>, list.options);
}

void first_order(const FactorList& list) {
  launch_both("update_factors_first_order", list, plain_blocks, first_order_kernel<float>,
              first_order_kernel<double>, list.options);
}

void second_order(const FactorList& list) {
  launch_both("update_factors_second_order", list, narrow_sum_blocks, second_order_kernel<float>,
              second_order_kernel<double>);
}

void factor_candidates(const FactorList& list) {
  launch_both("update_factors_candidates", list, sum_blocks, candidates_kernel<float>,
              candidates_kernel<double>, list.options);
}

void commit_factors(const FactorList& list) {
  Rejections rejections = {};
  for (size_t i = 0; i < list.rejected.size(); ++i) rejections.count[i] = list.rejected[i];
  launch_both("update_factors_commit", list, plain_blocks, commit_kernel<float>,
              commit_kernel<double>, list.options, rejections);
}

}  // namespace singd::cuda
