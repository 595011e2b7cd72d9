// The step sizes of update_factors_: beta1, divided by max(1, max |m|) where asked for, and such
// that beta1 times min(Frobenius norm, sqrt(1-norm x infinity-norm)) of m is within the cap.
//
//   norms        PartialNorms of m: a block owns 32 columns, whose entries its 8 warps share (a
//   lane
//                a column, so that a warp reads along a row), or 8 rows, a warp each; m is read
//                twice
//   step_sizes   a block a factor, from its PartialNorms
#include "factor_update.cuh"

namespace singd::cuda {
namespace {

constexpr int64_t kNormColumns = kWarp, kNormRows = kFactorWarps;  // as norm_blocks counts
static_assert(kNormColumns == 32 && kNormRows == 8);

struct Magnitudes {
  double sum = 0, squares = 0, largest = 0;

  template <class T>
  __device__ __forceinline__ void add(T value) {
    const double magnitude = fabs(static_cast<double>(value));
    sum += magnitude;
    squares += magnitude * magnitude;
    largest = combine<false>(largest, magnitude);
  }
};

// Line `index` (a row or a column) as one of a pattern: f(pattern, base, line), as with_entry.
template <class Function>
__device__ __forceinline__ void with_line(const Layout& layout, int64_t index, Function&& f) {
  switch (layout.family) {
    case Family::kDiagonal:
    case Family::kBlockDiagonal: {
      const BlockPattern blocks(layout);
      const int64_t first = blocks.start(index);
      Layout block;
      block.dim = blocks.width(index);
      return f(DensePattern(block), first * blocks.block, index - first);
    }
    case Family::kBordered:
      return f(BorderedPattern(layout), int64_t(0), index);
    default:
      return f(DensePattern(layout), int64_t(0), index);
  }
}

// The warp's share of column j: every 8th entry.
template <class T>
__device__ Magnitudes column_share(const Layout& layout, const T* m, int64_t j, int warp) {
  Magnitudes result;
  with_line(layout, j, [&](const auto& p, int64_t base, int64_t column) {
    for_each_range_of_column(p, column, [&](int64_t first, int64_t count) {
      const Line line = line_from(first, [&](int64_t i) { return p.slot(i, column); });
      for (int64_t n = warp; n < count; n += kFactorWarps) {
        result.add(load(m + base + line.start + n * line.stride));
      }
    });
  });
  return result;
}

// The lane's share of row i.
template <class T>
__device__ Magnitudes row_share(const Layout& layout, const T* m, int64_t i, int lane) {
  Magnitudes result;
  with_line(layout, i, [&](const auto& p, int64_t base, int64_t row) {
    const int64_t start = base + p.slot(row, p.row_column(row, 0));
    for (int64_t n = lane; n < p.row_length(row); n += kWarp) result.add(load(m + start + n));
  });
  return result;
}

// The coefficients of a Toeplitz factor, for a block of its own: their sum is the norm of a row.
template <class T>
__device__ Magnitudes toeplitz_share(const T* m, int64_t dim) {
  Magnitudes result;
  for (int64_t l = threadIdx.x; l < dim; l += kFactorThreads) {
    Magnitudes one;
    one.add(load(m + l));
    result.sum += one.sum;
    result.squares += static_cast<double>(dim - l) * one.squares;
    result.largest = combine<false>(result.largest, one.largest);
  }
  return result;
}

// The largest sum over a column of the block's 32, of which every warp has a share; for thread 0.
__device__ double largest_column(double share) {
  __shared__ double shares[kFactorThreads];
  shared_store(shares + threadIdx.x, share);
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < kWarp) {
    for (int w = 0; w < kFactorWarps; ++w) sum += shared_load(shares + w * kWarp + threadIdx.x);
  }
  return reduce_factor_block<false>(sum);
}

__device__ double largest_row(double share) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    share += __shfl_xor_sync(0xffffffffu, share, offset);
  }
  return reduce_factor_block<false>(share);
}

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    norms_kernel(const __grid_constant__ FactorTable table) {
  const FactorItem& item = table.find(blockIdx.x);
  const Layout layout = item.layout();
  const FactorArrays<T> arrays = arrays_of<T>(item);
  const int64_t block = blockIdx.x - item.first_block;
  const int64_t column_blocks = (layout.dim + kNormColumns - 1) / kNormColumns;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Magnitudes found;
  PartialNorms norms = {0, 0, 0, 0};
  if (layout.family == Family::kToeplitz) {
    found = toeplitz_share(arrays.h, layout.dim);
    norms.row = norms.column = reduce_factor_block<true>(found.sum);
  } else if (block < column_blocks) {
    const int64_t j = block * kNormColumns + lane;
    if (j < layout.dim) found = column_share(layout, arrays.h, j, warp);
    norms.column = largest_column(found.sum);
  } else {
    const int64_t i = (block - column_blocks) * kNormRows + warp;
    if (i < layout.dim) found = row_share(layout, arrays.h, i, lane);
    norms.row = largest_row(found.sum);
    found.squares = found.largest = 0;  // the column blocks have them
  }
  norms.squares = reduce_factor_block<true>(found.squares);
  norms.largest = reduce_factor_block<false>(found.largest);
  if (threadIdx.x != 0) return;
  PartialNorms* const to = arrays.norms + block;
  store(&to->row, norms.row);
  store(&to->column, norms.column);
  store(&to->squares, norms.squares);
  store(&to->largest, norms.largest);
}

template <class T>
__global__ void __launch_bounds__(kFactorThreads)
    step_sizes_kernel(const __grid_constant__ FactorTable table,
                      const __grid_constant__ FactorOptions options) {
  const FactorItem& item = table.find(blockIdx.x);
  const PartialNorms* const from = arrays_of<T>(item).norms;
  const int64_t count = norm_blocks(item.layout());
  PartialNorms norms = {0, 0, 0, 0};
  for (int64_t n = threadIdx.x; n < count; n += kFactorThreads) {
    norms.row = combine<false>(norms.row, load(&from[n].row));
    norms.column = combine<false>(norms.column, load(&from[n].column));
    norms.squares += load(&from[n].squares);
    norms.largest = combine<false>(norms.largest, load(&from[n].largest));
  }
  norms.row = reduce_factor_block<false>(norms.row);
  norms.column = reduce_factor_block<false>(norms.column);
  norms.squares = reduce_factor_block<true>(norms.squares);
  norms.largest = reduce_factor_block<false>(norms.largest);
  if (threadIdx.x != 0) return;
  double beta = read(options.lr_cov);
  if (options.normalize_lr_cov) beta /= combine<false>(1.0, norms.largest);
  const double frobenius = sqrt(norms.squares), mixed = sqrt(norms.row * norms.column);
  const double bound = mixed < frobenius ? mixed : frobenius;
  const bool capped = beta * bound > options.step_cap;
  FactorResult* const result = options.results + item.id;
  store(&result->beta, capped ? options.step_cap / bound : beta);
  store(&result->capped, static_cast<int32_t>(capped));
}

}  // namespace

void norms_of_factors(const FactorList& list) {
  const auto blocks_of = [](const FactorItem& item) { return norm_blocks(item.layout()); };
  launch_both("update_factors_norms", list, blocks_of, norms_kernel<float>, norms_kernel<double>);
}

void step_sizes(const FactorList& list) {
  launch_both("update_factors_step_sizes", list, one_block, step_sizes_kernel<float>,
              step_sizes_kernel<double>, list.options);
}

}  // namespace singd::cuda
