// The product of a strip of 64 rows or 64 columns of a matrix with a thin one, of width b <= 64, by
// one block: out[position, r] = sum_k strip[position, k] N[r, k].
//
// The block walks along its strip in chunks of 64, the next one loaded into registers while the
// current one, in shared memory, is multiplied. Its 8 warps share the chunk's depth and the border
// in groups of 16; a lane owns 2 x 16 sums. Partial sums are added in a fixed order.
#pragma once

#include "step.cuh"

namespace singd::cuda {

constexpr int kStrip = 64;
constexpr int kDepth = 64;
constexpr int kPitch = kStrip + 1;
constexpr int kGroup = 16;  // border indices of a warp
constexpr int kWarps = kStepThreads / kWarp;
constexpr int kChunkElements = kStrip * kDepth / kStepThreads;  // of a thread

// Warps are groups x splits: groups of border indices, parts of the depth.
SINGD_HOST_DEVICE inline int groups_of(int width) { return width <= 16 ? 1 : width <= 32 ? 2 : 4; }
template <class T>
SINGD_HOST_DEVICE constexpr int border_pitch(int groups) {
  return groups * kGroup + 16 / static_cast<int>(sizeof(T));
}
template <class T>
int64_t shared_elements(int width) {
  const int64_t operands = kDepth * kPitch + kDepth * border_pitch<T>(groups_of(width));
  return std::max<int64_t>(operands, kWarps * kGroup * kPitch);
}

// The gradient of a layer as rows: vectors where memory allows, elements elsewhere.
template <class E_>
struct GradientRows {
  using E = E_;
  using T = typename E::Compute;
  static constexpr bool kInVectors = E::kCount > 1;
  using Vector = Vec<std::conditional_t<kInVectors, typename E::Stored, T>, E::kCount>;
  const StepLayer& l;

  __device__ int rows() const { return l.rows; }
  __device__ int columns() const { return l.columns; }
  __device__ bool is_vector(int j) const {
    return l.gradient_in_vectors && j + E::kCount <= l.weight_columns();
  }
  __device__ Vector vector(int64_t i, int j) const {
    const auto* row = static_cast<const typename E::Stored*>(l.gradient) + i * l.gradient_pitch;
    return load(reinterpret_cast<const Vector*>(row + j));
  }
  __device__ T element(int64_t i, int j) const { return load_gradient<E>(l, i, j); }
};

// X and G_B.
template <class T>
struct ThinRows {
  using E = Elements<T, T>;
  static constexpr bool kInVectors = true;
  using Vector = Vec<T, E::kCount>;
  const T* data;
  int row_count, column_count;

  __device__ int rows() const { return row_count; }
  __device__ int columns() const { return column_count; }
  __device__ bool is_vector(int j) const { return j + E::kCount <= column_count; }
  __device__ Vector vector(int64_t i, int j) const {
    return load(reinterpret_cast<const Vector*>(data + i * padded(column_count) + j));
  }
  __device__ T element(int64_t i, int j) const { return load(data + i * padded(column_count) + j); }
};

// A chunk of 64 x 64 elements on its way from global to shared memory: vectors by way of registers,
// single elements directly.
template <class Source>
struct Chunk {
  using E = typename Source::E;
  using T = typename E::Compute;
  static constexpr int kCount = E::kCount;
  static constexpr int kVectors = kChunkElements / kCount;
  static constexpr int kAcross = 64 / kCount;
  const Source& source;
  const bool strip_of_rows;
  int largest = 0;  // magnitude
  int row, column;  // where the chunk begins
  typename Source::Vector values[Source::kInVectors ? kVectors : 1];

  __device__ Chunk(const Source& s, bool rows) : source(s), strip_of_rows(rows) {}

  __device__ __forceinline__ bool is_vector(int i, int j) const {
    return Source::kInVectors && row + i < source.rows() && source.is_vector(column + j);
  }

  // To [depth][strip]: the strip's positions are rows or columns.
  __device__ __forceinline__ void put(int i, int j, T value, T* shared) {
    shared_store(shared + (strip_of_rows ? j * kPitch + i : i * kPitch + j), value);
    largest = max(largest, magnitude(value));
  }

  __device__ __forceinline__ void fetch(int first_row, int first_column) {
    row = first_row;
    column = first_column;
    if constexpr (Source::kInVectors) {
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        const int index = n * kStepThreads + threadIdx.x;
        const int i = index / kAcross, j = index % kAcross * kCount;
        if (is_vector(i, j)) values[n] = source.vector(row + i, column + j);
      }
    }
  }

  __device__ __forceinline__ void commit(T* shared) {
    if constexpr (Source::kInVectors) {
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        const int index = n * kStepThreads + threadIdx.x;
        const int i = index / kAcross, j = index % kAcross * kCount;
        if (is_vector(i, j)) {
#pragma unroll
          for (int e = 0; e < kCount; ++e) put(i, j + e, widen<T>(values[n][e]), shared);
        } else {
#pragma unroll 1
          for (int e = 0; e < kCount; ++e) commit_element(i, j + e, shared);
        }
      }
    } else {
#pragma unroll 4
      for (int n = 0; n < kVectors; ++n) {
        const int index = n * kStepThreads + threadIdx.x;
        commit_element(index / kAcross, index % kAcross, shared);
      }
    }
  }

 private:
  __device__ __forceinline__ void commit_element(int i, int j, T* shared) {
    const bool inside = row + i < source.rows() && column + j < source.columns();
    put(i, j, inside ? source.element(row + i, column + j) : T(0), shared);
  }
};

// One operand of a strip's product: columns [begin, end) of N [width, ...] with rows of length
// `pitch`.
template <class T>
struct Border {
  const T* n;
  int width;
  int begin, end;
  int64_t pitch;

  // N[:, k ...] to [depth][border index], 0 beyond.
  __device__ __forceinline__ void stage(int k, int groups, T* shared) const {
#pragma unroll 2
    for (int at = threadIdx.x; at < groups * kGroup * kDepth; at += kStepThreads) {
      const int r = at / kDepth, depth = at % kDepth;
      const bool inside = r < width && k + depth < end;
      shared_store(shared + depth * border_pitch<T>(groups) + r,
                   inside ? load(n + r * pitch + k + depth) : T(0));
    }
  }
};

template <class T>
struct Sums {
  T values[2][kGroup];
};

// The part of a warp in the product of a staged chunk.
template <class T>
__device__ __forceinline__ void multiply_chunk(const T* strip, const T* border, int groups,
                                               Sums<T>& sums) {
  using Vector = Vec<T, kVector<T>>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int depth = kDepth / (kWarps / groups), begin = warp / groups * depth;
  const int first = warp % groups * kGroup;
#pragma unroll 1
  for (int k = begin; k < begin + depth; ++k) {
    const T x0 = shared_load(strip + k * kPitch + lane);
    const T x1 = shared_load(strip + k * kPitch + kWarp + lane);
    const auto* row = reinterpret_cast<const Vector*>(border + k * border_pitch<T>(groups) + first);
#pragma unroll
    for (int q = 0; q < kGroup / kVector<T>; ++q) {
      const Vector n = shared_load(row + q);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        sums.values[0][q * kVector<T> + e] += x0 * n[e];
        sums.values[1][q * kVector<T> + e] += x1 * n[e];
      }
    }
  }
}

// out(position in the strip, border index, sum of all warps), for positions below `positions`.
template <class T, class Out>
__device__ __forceinline__ void reduce(const Sums<T>& sums, int width, int positions,
                                       bool border_first, Out&& out) {
  T* const shared = dynamic_shared<T>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, groups = groups_of(width);
  const int count = min(positions, kStrip);
#pragma unroll
  for (int r = 0; r < kGroup; ++r) {
    shared_store(shared + (warp * kGroup + r) * kPitch + lane, sums.values[0][r]);
    shared_store(shared + (warp * kGroup + r) * kPitch + kWarp + lane, sums.values[1][r]);
  }
  __syncthreads();
  for (int at = threadIdx.x; at < width * count; at += kStepThreads) {
    const int r = border_first ? at % width : at / count;
    const int position = border_first ? at / width : at % count;
    T sum = 0;
    for (int split = 0; split < kWarps / groups; ++split) {
      const int source = split * groups + r / kGroup;
      sum += shared_load(shared + (source * kGroup + r % kGroup) * kPitch + position);
    }
    out(position, r, sum);
  }
}

// The product of a strip of rows, or of columns, with the border. Returns the largest magnitude
// that this thread has read of the strip.
template <class Source, class T>
__device__ __forceinline__ int multiply_strip(const Source& source, bool strip_of_rows, int strip,
                                              const Border<T>& border, Sums<T>& sums) {
  T* const shared = dynamic_shared<T>();
  T* const shared_border = shared + kDepth * kPitch;
  const int groups = groups_of(border.width);
  const int begin = strip * kStrip;
  Chunk<Source> chunk(source, strip_of_rows);
  const auto fetch = [&](int k) { strip_of_rows ? chunk.fetch(begin, k) : chunk.fetch(k, begin); };
  fetch(border.begin);
  for (int k = border.begin; k < border.end; k += kDepth) {
    chunk.commit(shared);
    border.stage(k, groups, shared_border);
    __syncthreads();
    if (border.end - k > kDepth) fetch(k + kDepth);
    multiply_chunk(shared, shared_border, groups, sums);
    __syncthreads();
  }
  return chunk.largest;
}

}  // namespace singd::cuda
