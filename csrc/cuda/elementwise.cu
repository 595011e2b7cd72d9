// project, extract and to_dense. The pattern of a structure (csrc/structures/pattern.h) says which
// entry (i, j) of the matrix a slot s of the storage holds, and the other way around:
//
//   gather_entries      storage[s] = [weight(i, j)] matrix[i, j]      (0 in the slots that the
//                       pattern leaves zero); reads and writes each entry of the pattern once
//   scatter_entries     matrix[i, j] = storage[slot(i, j)] or 0; writes dim^2 entries once
//   average_diagonals   storage[l] = weight(l) mean_i matrix[i, i + l], the projection of Toeplitz
//                       structures; reads the upper triangle once
//
// A thread of gather_entries owns one slot, one of scatter_entries 16 bytes of the matrix. A block
// of average_diagonals owns 32 neighbouring diagonals, one a lane, so that a warp reads along a row
// of the matrix; its 8 warps share the rows, and their sums are added in a fixed order.
#include "../structures/pattern.h"
#include "elementwise.h"
#include "launch.cuh"
#include "numeric.cuh"

namespace singd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

int64_t blocks_for(int64_t items) { return (items + kThreads - 1) / kThreads; }

template <class T, class Pattern>
__global__ void __launch_bounds__(kThreads)
    gather_entries(const Pattern pattern, bool transposed, bool weighted, const DenseMatrix matrix,
                   T* storage) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot >= pattern.size()) return;
  const Position at = pattern.position(slot);
  T value = narrow<T>(0.0F);
  if (pattern.slot(at.row, at.column) == slot) {
    const int64_t row = transposed ? at.column : at.row, column = transposed ? at.row : at.column;
    value = load(static_cast<const T*>(matrix.data) + row * matrix.row_stride +
                 column * matrix.column_stride);
    if (weighted) {
      using A = compute_t<T>;
      value = narrow<T>(static_cast<A>(pattern.weight(at.row, at.column)) * widen<A>(value));
    }
  }
  store(storage + slot, value);
}

template <class T, class Pattern>
__global__ void __launch_bounds__(kThreads)
    scatter_entries(const Pattern pattern, bool transposed, const T* storage, T* matrix) {
  const int64_t size = pattern.dim * pattern.dim;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector<T>;
  if (begin >= size) return;
  int64_t i = begin / pattern.dim, j = begin % pattern.dim;
  Vec<T, kVector<T>> values;
#pragma unroll
  for (int n = 0; n < kVector<T>; ++n) {
    // Beyond the last entry i == dim, which the pattern does not know.
    const int64_t slot = begin + n >= size ? -1
                         : transposed      ? pattern.slot(j, i)
                                           : pattern.slot(i, j);
    values[n] = slot < 0 ? narrow<T>(0.0F) : load(storage + slot);
    if (++j == pattern.dim) {
      j = 0;
      ++i;
    }
  }
  if (begin + kVector<T> <= size) {
    store<Cache::kStreaming>(reinterpret_cast<Vec<T, kVector<T>>*>(matrix + begin), values);
    return;
  }
#pragma unroll
  for (int n = 0; n < kVector<T>; ++n) {
    if (begin + n < size) store(matrix + begin + n, values[n]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    average_diagonals(int64_t dim, const DenseMatrix matrix, T* storage) {
  __shared__ double sums[kThreads];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t diagonal = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const T* const first = static_cast<const T*>(matrix.data) + diagonal * matrix.column_stride;
  const int64_t step = matrix.row_stride + matrix.column_stride;
  double sum = 0;
  for (int64_t i = warp; i + diagonal < dim; i += kWarps)
    sum += widen<double>(load(first + i * step));
  shared_store(sums + threadIdx.x, sum);
  __syncthreads();
  if (warp > 0 || diagonal >= dim) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += shared_load(sums + w * kWarp + lane);
  const double mean = sum / static_cast<double>(dim - diagonal);
  store(storage + diagonal, narrow<T>(static_cast<compute_t<T>>(diagonal == 0 ? mean : 2 * mean)));
}

// Calls f with a value of the element type.
template <class Function>
void dispatch(Dtype dtype, Function&& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(bfloat16{});
    case Dtype::kFloat16:
      return f(float16{});
  }
}

void launch_gather(const Layout& layout, Dtype dtype, bool weighted, const DenseMatrix& matrix,
                   void* storage, Stream stream) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    visit_pattern(layout, [&](const auto& pattern) {
      using Pattern = std::decay_t<decltype(pattern)>;
      launch({"gather_entries", blocks_for(pattern.size()), kThreads, stream},
             gather_entries<T, Pattern>, pattern, layout.transposed, weighted, matrix,
             static_cast<T*>(storage));
    });
  });
}

}  // namespace

void project(const Layout& layout, Dtype dtype, const DenseMatrix& symmetric, void* storage,
             Stream stream) {
  if (layout.family != Family::kToeplitz) {
    return launch_gather(layout, dtype, true, symmetric, storage, stream);
  }
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch({"average_diagonals", (layout.dim + kWarp - 1) / kWarp, kThreads, stream},
           average_diagonals<T>, layout.dim, symmetric, static_cast<T*>(storage));
  });
}

void extract(const Layout& layout, Dtype dtype, const DenseMatrix& matrix, void* storage,
             Stream stream) {
  if (layout.family != Family::kToeplitz) {
    return launch_gather(layout, dtype, false, matrix, storage, stream);
  }
  // The pattern names diagonal l by the entry (0, l) of R; its last entry is l rows above the end
  // of the last column. A matrix that starts at the end and goes backwards has it at (0, l) and (l,
  // 0).
  const int64_t end = (layout.dim - 1) * (matrix.row_stride + matrix.column_stride);
  const int64_t above = layout.transposed ? -matrix.column_stride : -matrix.row_stride;
  const DenseMatrix last_column{static_cast<const char*>(matrix.data) + end * size_of(dtype), above,
                                above};
  launch_gather(layout, dtype, false, last_column, storage, stream);
}

void to_dense(const Layout& layout, Dtype dtype, const void* storage, void* matrix, Stream stream) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    visit_pattern(layout, [&](const auto& pattern) {
      using Pattern = std::decay_t<decltype(pattern)>;
      const int64_t items = (layout.dim * layout.dim + kVector<T> - 1) / kVector<T>;
      launch({"scatter_entries", blocks_for(items), kThreads, stream}, scatter_entries<T, Pattern>,
             pattern, layout.transposed, static_cast<const T*>(storage), static_cast<T*>(matrix));
    });
  });
}

}  // namespace singd::cuda
