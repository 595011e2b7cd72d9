// Rows of X on their way to shared memory, as tiles of 16 consecutive columns: what the Gram
// kernels and the border products stage.
#pragma once

#include "rows.cuh"

namespace singd::cuda {

constexpr int kGramThreads = 256;
constexpr int kTile = 16;
constexpr int64_t kBeyond = INT64_MAX / 4;  // a column that no matrix has

// The columns of X that are staged: two runs of tiles, each of consecutive columns.
struct TileRuns {
  int64_t first[2];
  int count[2];

  SINGD_HOST_DEVICE int tiles() const { return count[0] + count[1]; }
  __device__ int64_t column(int staged) const {
    const int split = count[0] * kTile;
    if (staged < split) return first[0] + staged;
    return staged < tiles() * kTile ? first[1] + staged - split : kBeyond;
  }
};

// The value as Stage; several planes add up to it.
template <class Stage, int kPlanes, class T>
__device__ __forceinline__ void to_planes(T value, Stage (&planes)[kPlanes]) {
  if constexpr (kPlanes > 1) {
    float rest = value;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      planes[p] = narrow<Stage>(rest);
      rest -= widen<float>(planes[p]);
    }
  } else if constexpr (std::is_same_v<T, Stage>) {
    planes[0] = value;
  } else {
    planes[0] = widen<Stage>(value);
  }
}

// Brings rows first ... first + kRows - 1 of kTiles tiles to shared memory, zero from row `end` on;
// kPlanes planes of kTiles tiles side by side.
// fetch() loads 16-byte vectors to registers and put() moves them on, so that there is time between
// the two; misaligned or strided rows are moved by put() alone, element by element.
template <class T, class Stage, int kRows, int kTiles, int kPlanes, RowAccess kAccess>
struct Stager {
  static constexpr int kColumns = kTiles * kTile;

  __device__ void fetch(const Rows&, const TileRuns&, int64_t, int64_t) {}

  __device__ __forceinline__ void put(const Rows& x, const TileRuns& runs, int64_t first,
                                      int64_t end, Stage* stage, int stride) const {
#pragma unroll 4
    for (int n = threadIdx.x; n < kRows * kColumns; n += kGramThreads) {
      const int row = kAccess == RowAccess::kRows ? n % kRows : n / kColumns;
      const int column = kAccess == RowAccess::kRows ? n / kRows : n % kColumns;
      T value = narrow<T>(compute_t<T>(0));
      if (first + row < end) value = element<T>(x, x.offset(first + row), runs.column(column));
      Stage planes[kPlanes];
      to_planes(value, planes);
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        shared_store(stage + row * stride + p * kColumns + column, planes[p]);
      }
    }
  }
};

template <class T, class Stage, int kRows, int kTiles, int kPlanes>
struct Stager<T, Stage, kRows, kTiles, kPlanes, RowAccess::kVectors> {
  static constexpr int kColumns = kTiles * kTile;
  static constexpr int kSize = kVector<T>;
  static constexpr int kPerRow = kTiles * kTile / kSize;
  static constexpr int kPieces = kRows * kPerRow / kGramThreads;
  static_assert(kPieces * kGramThreads == kRows * kPerRow, "threads share evenly");
  Vec<T, kSize> pieces[kPieces];

  static __device__ __forceinline__ int row(int q) {
    return (q * kGramThreads + threadIdx.x) / kPerRow;
  }
  static __device__ __forceinline__ int column(int q) {
    return (q * kGramThreads + threadIdx.x) % kPerRow * kSize;
  }

  __device__ __forceinline__ void fetch(const Rows& x, const TileRuns& runs, int64_t first,
                                        int64_t end) {
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      const int64_t r = first + row(q);
      const bool exists = r < end;  // where not, a column beyond all others makes zeros
      pieces[q] = vector<T>(x, exists ? x.offset(r) : 0, exists ? runs.column(column(q)) : kBeyond);
    }
  }

  __device__ __forceinline__ void put(const Rows&, const TileRuns&, int64_t, int64_t, Stage* stage,
                                      int stride) const {
    constexpr int kPart = kVector<Stage> < kSize ? kVector<Stage> : kSize;
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
#pragma unroll
      for (int e = 0; e < kSize; e += kPart) {
        Vec<Stage, kPart> parts[kPlanes];
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
          Stage planes[kPlanes];
          to_planes(pieces[q][e + k], planes);
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) parts[p][k] = planes[p];
        }
        Stage* to = stage + row(q) * stride + column(q) + e;
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          shared_store(reinterpret_cast<Vec<Stage, kPart>*>(to + p * kColumns), parts[p]);
        }
      }
    }
  }
};

// Fills the slots of a ring in shared memory with the rows begin ... end - 1 of kTiles tiles, kRows
// rows a slot: next(slot) brings the next ones, zeros from row `end` on. They are there after
// commit_copies, wait_for_copies and a barrier. What stands in columns that x does not have is
// undefined.
//
// Vectors that are staged as they are, are copied asynchronously. Others are loaded to registers
// one slot ahead, and elements when they are put.
template <class T, class Stage, int kRows, int kTiles, int kPlanes, RowAccess kAccess, Cache kCache>
class RowFeed {
 public:
  __device__ __forceinline__ RowFeed(const Rows& x, const TileRuns& runs, int64_t begin,
                                     int64_t end)
      : x_(x), runs_(runs), row_(begin), end_(end) {
    stager_.fetch(x_, runs_, row_, end_);
  }

  __device__ __forceinline__ void next(Stage* slot, int stride) {
    stager_.put(x_, runs_, row_, end_, slot, stride);
    row_ += kRows;
    if (row_ < end_) stager_.fetch(x_, runs_, row_, end_);
  }

 private:
  const Rows& x_;
  const TileRuns& runs_;
  int64_t row_, end_;
  Stager<T, Stage, kRows, kTiles, kPlanes, kAccess> stager_;
};

// A thread copies every kStep-th row of the same kSize columns. Where rows lie at one stride, it
// goes from row to row by an addition.
template <class T, int kRows, int kTiles, Cache kCache>
class RowFeed<T, T, kRows, kTiles, 1, RowAccess::kVectors, kCache> {
  static constexpr int kSize = kVector<T>;
  static constexpr int kPerRow = kTiles * kTile / kSize;
  static constexpr int kStep = kGramThreads / kPerRow;
  static constexpr int kPieces = kRows / kStep;
  static_assert(kStep * kPerRow == kGramThreads && kPieces * kStep == kRows, "shared evenly");

 public:
  __device__ __forceinline__ RowFeed(const Rows& x, const TileRuns& runs, int64_t begin,
                                     int64_t end)
      : x_(x), end_(static_cast<uint32_t>(end)) {
    const int row = static_cast<int>(threadIdx.x) / kPerRow;
    const int staged = static_cast<int>(threadIdx.x) % kPerRow * kSize;
    const int64_t column = runs.column(staged);
    row_ = static_cast<uint32_t>(begin) + row;
    stage_row_ = held(row);
    stage_column_ = held(staged);
    in_memory_ = held(column < x.features);
    is_ones_ = held(column == x.features);
    from_ = static_cast<const T*>(x.data);
    if (in_memory_) from_ += column + (strided() ? 0 : x.offset(row_));
  }

  __device__ __forceinline__ void next(T* slot, int stride) {
    T* const to = slot + stage_row_ * stride + stage_column_;
    if (in_memory_) {
      copy(to, stride);
    } else if (is_ones_) {
      put_ones(to, stride);
    }
    row_ += kRows;
  }

 private:
  // Rows at two strides: from_ is the column of row 0 then, else that of the next row.
  __device__ __forceinline__ bool strided() const { return x_.inner_count != 1; }

  __device__ __forceinline__ void copy(T* to, int stride) {
    if (strided()) {
#pragma unroll 1
      for (int q = 0; q < kPieces; ++q) {
        const uint32_t row = row_ + q * kStep;
        copy_async<kCache>(to + q * kStep * stride, from_ + x_.offset(row), row < end_);
      }
      return;
    }
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      copy_async<kCache>(to + q * kStep * stride, from_, row_ + q * kStep < end_);
      from_ += kStep * x_.outer_stride;
    }
  }

  __device__ __forceinline__ void put_ones(T* to, int stride) const {
    using V = Vec<T, kSize>;
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      V v;
#pragma unroll
      for (int e = 0; e < kSize; ++e) v[e] = narrow<T>(compute_t<T>(0));
      if (row_ + q * kStep < end_) v[0] = narrow<T>(static_cast<compute_t<T>>(x_.ones));
      shared_store(reinterpret_cast<V*>(to + q * kStep * stride), v);
    }
  }

  const Rows& x_;
  const T* from_;
  uint32_t row_, end_;  // below 2^31, but for rows beyond the end
  int stage_row_, stage_column_;
  int in_memory_, is_ones_;
};

}  // namespace singd::cuda
