// A tile of Z = G A_K and P = A_C Z in shared memory, in the compute type: G by columns, then Z by
// rows, then P by rows in the place of G. A thread owns 16 sums of a column of Z, then 16 of a row
// of P. With delta and N of a side (preconditioned_update.h):
//
//   Z[i, j] = delta_K[j] G[i, j] + sum_t N_K[t, j] S[i, t]
//   P[i, j] = delta_C[i] Z[i, j] + sum_t N_C[t, i] Q[t, j]
//
// S: the block's columns of G, the border columns of G (row-bordered K), or G N_K^T; Q: the block's
// rows of Z, the border rows of Z (row-bordered C), or N_C Z. Border columns and rows themselves
// are G N_K^T and N_C Z.
#pragma once

#include "step.cuh"

namespace singd::cuda {

constexpr int kRun = 16;  // sums of a thread

// The arrays in shared memory, and their sizes in elements.
struct TileArrays {
  int rows;                   // of a tile, padded to whole runs and swizzles
  int pitch;                  // from row to row of Z and P
  int border, z, left, size;  // G or P come first

  SINGD_HOST_DEVICE TileArrays(const StepLayer& l, int tile_rows, int vector, int element_bytes) {
    const bool aligned = l.tile_columns % kRun == 0;
    const int columns = static_cast<int>(padded(l.tile_columns + (aligned ? 0 : vector - 1)));
    rows = (tile_rows + 31) / 32 * 32;
    pitch = columns + 16 / element_bytes;  // an odd number of 16-byte words
    border = rows * pitch;
    z = border + (l.right.bordered() ? l.right.width * rows : 0);
    left = z + (rows + (l.left.bordered() ? l.left.width : 0)) * pitch;
    size = left + l.left.width * rows;
  }
};

// Columns of G and of S are stored one after the other, in 16-byte words that hold successive rows.
// The words of a column are permuted so that neither reading neighbouring columns nor writing
// columns a vector apart makes lanes meet in a bank.
template <class T>
__device__ __forceinline__ int word_of(int column, int word) {
  return word ^ ((column ^ column >> 3) & 7);
}
template <class T>
__device__ __forceinline__ T* row_of_column(T* columns, int rows, int column, int row) {
  constexpr int kWord = kVector<T>;
  return columns + column * rows + word_of<T>(column, row / kWord) * kWord + row % kWord;
}

// sums += factor * the 16 rows from `row` on of a column.
template <class T>
__device__ __forceinline__ void add_rows(const T* columns, int rows, int column, int row, T factor,
                                         T (&sums)[kRun]) {
  constexpr int kWord = kVector<T>;
  using Word = Vec<T, kWord>;
  const Word* const words = reinterpret_cast<const Word*>(columns + column * rows);
#pragma unroll
  for (int q = 0; q < kRun / kWord; ++q) {
    const Word word = shared_load(words + word_of<T>(column, row / kWord + q));
#pragma unroll
    for (int e = 0; e < kWord; ++e) sums[q * kWord + e] += factor * word[e];
  }
}

// sums += factor * 16 successive elements.
template <class T>
__device__ __forceinline__ void add_run(const T* run, T factor, T (&sums)[kRun]) {
  constexpr int kWord = kVector<T>;
  using Word = Vec<T, kWord>;
#pragma unroll
  for (int q = 0; q < kRun / kWord; ++q) {
    const Word word = shared_load(reinterpret_cast<const Word*>(run) + q);
#pragma unroll
    for (int e = 0; e < kWord; ++e) sums[q * kWord + e] += factor * word[e];
  }
}

// What a tile needs at hand: the layer's arrays in the workspace, and shared memory.
template <class T>
struct Stage {
  const StepLayer& l;
  const Tile& tile;
  const TileArrays arrays;
  const StepOffsets offsets;
  T* const workspace;
  T* const shared;

  __device__ Stage(const StepLayer& layer, const Tile& t, int tile_rows, int vector)
      : l(layer),
        tile(t),
        arrays(layer, tile_rows, vector, sizeof(T)),
        offsets(layer),
        workspace(static_cast<T*>(layer.workspace)),
        shared(dynamic_shared<T>()) {}

  __device__ T* z_row(int row) const { return shared + arrays.z + row * arrays.pitch; }
  __device__ T* p_row(int row) const { return shared + row * arrays.pitch; }
  __device__ bool has_right() const { return l.right.action != Action::kDiagonal; }
  __device__ bool has_left() const { return l.left.action != Action::kDiagonal; }
  __device__ T right_delta(int64_t j) const { return load(workspace + offsets.right_delta + j); }
  __device__ T left_delta(int64_t i) const { return load(workspace + offsets.left_delta + i); }

  // G[row, j], on its way to Z.
  __device__ void put(int row, int j, T value) const {
    if (has_right()) {
      shared_store(row_of_column(shared, arrays.rows, j - tile.base, row), value);
    } else {
      shared_store(z_row(row) + j - tile.base, value * right_delta(j));
    }
  }
};

// S of a bordered K: product(i, t), or column border_index(t) of the rows for a row-bordered K.
template <class T, class Product, class Rows>
__device__ __forceinline__ void stage_border(const Stage<T>& s, Product&& product, Rows&& value) {
  const SideShape& side = s.l.right;
  for (int at = threadIdx.x; at < side.width * s.tile.rows; at += kStepThreads) {
    const int row = at / side.width, t = at % side.width;
    const int64_t i = s.tile.row + row;
    const T x = side.action == Action::kRowBordered
                    ? value(i, static_cast<int>(side.border_index(t, s.l.columns)))
                    : product(i, t);
    shared_store(row_of_column(s.shared + s.arrays.border, s.arrays.rows, t, row), x);
  }
}

// Z of the tile, unless K is diagonal.
template <class T, class Product>
__device__ __forceinline__ void multiply_right(const Stage<T>& s, Product&& product) {
  const SideShape& side = s.l.right;
  const Tile& tile = s.tile;
  const T* const n = s.workspace + s.offsets.right_n;
  const int64_t pitch = padded(s.l.columns);
  const int runs = (tile.rows + kRun - 1) / kRun;
  for (int at = threadIdx.x; at < tile.columns * runs; at += kStepThreads) {
    const int run = at / tile.columns, j = tile.column + at - run * tile.columns;
    const int row = run * kRun, slot = j - tile.base;
    const T* source = s.shared + s.arrays.border;
    int first = 0, count = side.width;
    T sums[kRun] = {};
    if (side.action == Action::kBlocks) {
      const int start = j / side.width * side.width;
      source = s.shared;
      first = start - tile.base;
      count = min(count, s.l.columns - start);
    } else {
      add_rows(s.shared, s.arrays.rows, slot, row, s.right_delta(j), sums);
    }
#pragma unroll 2
    for (int t = 0; t < count; ++t) {
      add_rows(source, s.arrays.rows, first + t, row, load(n + t * pitch + j), sums);
    }
    const bool is_product = side.action == Action::kRowBordered && side.is_border(j, s.l.columns);
    const int r = is_product ? static_cast<int>(side.border_row(j, s.l.columns)) : 0;
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      if (row + e >= tile.rows) continue;
      const T z = is_product ? product(tile.row + row + e, r) : sums[e];
      shared_store(s.z_row(row + e) + slot, z);
    }
  }
}

// N_C in the rows of the tile, and Q of a bordered C below the rows of Z.
template <class T>
__device__ __forceinline__ void stage_left(const Stage<T>& s) {
  const SideShape& side = s.l.left;
  const Tile& tile = s.tile;
  for (int at = threadIdx.x; at < side.width * tile.rows; at += kStepThreads) {
    const int t = at / tile.rows, row = at % tile.rows;
    const T* const n = s.workspace + s.offsets.left_n + t * padded(s.l.rows) + tile.row;
    shared_store(s.shared + s.arrays.left + t * s.arrays.rows + row, load(n + row));
  }
  if (!side.bordered()) return;
  const int first = side.action == Action::kRowBordered ? side.width : 0;
  for (int at = threadIdx.x; at < side.width * tile.columns; at += kStepThreads) {
    const int t = at / tile.columns, j = tile.column + at % tile.columns;
    const T* const q = s.workspace + s.offsets.thin_result + (first + t) * padded(s.l.columns);
    shared_store(s.z_row(s.arrays.rows + t) + j - tile.base, load(q + j));
  }
}

// P of the tile, unless C is diagonal.
template <class T>
__device__ __forceinline__ void multiply_left(const Stage<T>& s) {
  const SideShape& side = s.l.left;
  const Tile& tile = s.tile;
  const int runs = (tile.column + tile.columns - tile.base + kRun - 1) / kRun;
  for (int at = threadIdx.x; at < s.arrays.rows * runs; at += kStepThreads) {
    const int row = at % s.arrays.rows, slot = at / s.arrays.rows * kRun;
    if (row >= tile.rows) continue;
    const int64_t i = tile.row + row;
    int first = s.arrays.rows, count = side.width;
    T sums[kRun] = {};
    if (side.action == Action::kBlocks) {
      const int start = static_cast<int>(i) / side.width * side.width;
      first = start - tile.row;
      count = min(count, s.l.rows - start);
    } else {
      add_run(s.z_row(row) + slot, s.left_delta(i), sums);
    }
    const T* const n = s.shared + s.arrays.left + row;
#pragma unroll 2
    for (int t = 0; t < count; ++t) {
      add_run(s.z_row(first + t) + slot, shared_load(n + t * s.arrays.rows), sums);
    }
    if (side.action == Action::kRowBordered && side.is_border(i, s.l.rows)) {
      const T* const product =
          s.workspace + s.offsets.thin_result + side.border_row(i, s.l.rows) * padded(s.l.columns);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        const int j = tile.base + slot + e;
        if (j >= tile.column && j < tile.column + tile.columns) sums[e] = load(product + j);
      }
    }
    using Word = Vec<T, kVector<T>>;
#pragma unroll
    for (int q = 0; q < kRun / kVector<T>; ++q) {
      Word word;
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) word[e] = sums[q * kVector<T> + e];
      shared_store(reinterpret_cast<Word*>(s.p_row(row) + slot) + q, word);
    }
  }
}

}  // namespace singd::cuda
