// What a warp of matrix_products multiplies at a time: operands of 16 k's of G and N, which come
// from global memory into registers.
//
// No operand goes through shared memory: a sum over k does not depend on the order of the k's, so a
// lane takes four that lie side by side where the instruction would have it take two pairs, and
// what it loads as a vector are its words. For X, whose k's are rows of G, words are made of two
// rows. G is the right operand, N the left one, so that the words of a vector are neighbours there,
// too. N is split into planes of bfloat16 (planes.cuh), once for all rows or columns that a warp
// owns, and so is G where it is no bfloat16.
#pragma once

#include "planes.cuh"
#include "step.cuh"

namespace singd::cuda {

constexpr int kThinThreads = 128;  // and a panel's rows are a multiple of it
constexpr int kThinWarps = kThinThreads / kWarp;

// kTiles: border tiles of a warp, of which wider borders have several parts. The warps of a block
// are groups, which own rows or columns, of as many splits of k; with a wide border, groups share
// N.
template <class E, int kTiles>
struct ThinShape {
  using Stored = typename E::Stored;
  static constexpr int kGradientPlanes = kStoredPlanes<Stored>;
  static constexpr int kPlanes = kComputePlanes<Stored>;
  static constexpr int kOuterTiles = 2;  // of a warp
  static constexpr int kOuter = kOuterTiles * kMatrix;
  static constexpr int kVectors = 2 * kOuterTiles;  // of a lane in a step along k
  static constexpr int kGroups = kTiles > 1 ? 4 : 2;
  static constexpr int kSplits = kThinWarps / kGroups;
  static constexpr int kOwned = kGroups * kOuter;  // rows or columns of a block
  // Steps of G that are on their way.
  static constexpr int kAhead = kTiles > 1 || sizeof(Stored) > 2 ? 2 : 3;
  static constexpr int kBlocks = 4;  // of a multiprocessor

  // From step to step of a warp. It is no constant to the compiler, which would keep an index for
  // each step that is on its way, in registers that are needed for the sums.
  static __device__ int stride() { return blockDim.x / kWarp / kGroups * kMatrix; }
};

// What a lane, 4 q + p, holds of G in a step along k:
//
//   for S   four k's of the rows q + 8 n
//   for X   four columns, from 4 q + 32 (n / 4) on, in row n % 4 of the four k's
//
// It is kept as it is loaded, in words, so that nothing waits for it before its product.
template <class E, int kTiles>
struct GradientStep {
  using S = ThinShape<E, kTiles>;
  using Stored = typename S::Stored;
  static constexpr int kWords = 4 * sizeof(Stored) / 4;  // of four numbers
  using Numbers = Vec<uint32_t, kWords>;
  Numbers g[S::kVectors];

  __device__ __forceinline__ void inspect(LargestMagnitude<Stored>& largest) const {
#pragma unroll
    for (int n = 0; n < S::kVectors; ++n) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) largest.add(g[n][w]);
    }
  }

  // Tile `tile` of G as an operand.
  template <bool kRows>
  __device__ __forceinline__ void operand(
      int tile, MatrixOperand<bfloat16> (&planes)[S::kGradientPlanes]) const {
    if constexpr (std::is_same_v<Stored, bfloat16>) {
#pragma unroll
      for (int w = 0; w < 4; ++w) planes[0].words[w] = word<kRows>(tile, w);
    } else {
      float values[8];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(Stored) == 4) {
          values[2 * w] = number<kRows>(tile, w, 0);
          values[2 * w + 1] = number<kRows>(tile, w, 1);
        } else {
          Vec<Stored, 2> both;
          const uint32_t bits = word<kRows>(tile, w);
          memcpy(static_cast<void*>(&both), &bits, sizeof both);
          values[2 * w] = widen<float>(both[0]);
          values[2 * w + 1] = widen<float>(both[1]);
        }
      }
      split(values, planes);
    }
  }

  // Operand words of 16-bit numbers.
  template <bool kRows>
  __device__ __forceinline__ uint32_t word(int tile, int w) const {
    if constexpr (kRows) return g[2 * tile + w / 2][w % 2];
    const Numbers* const rows = g + tile / 2 * 4 + w % 2 * 2;
    const uint32_t a = rows[0][tile % 2], b = rows[1][tile % 2];
    return w / 2 == 0 ? (a & 0xffffU) | b << 16 : a >> 16 | (b & 0xffff0000U);
  }
  // The numbers of operand words of float32.
  template <bool kRows>
  __device__ __forceinline__ float number(int tile, int w, int half) const {
    if constexpr (kRows) return from_bits(g[2 * tile + w / 2][w % 2 * 2 + half]);
    return from_bits(g[tile / 2 * 4 + w % 2 * 2 + half][tile % 2 * 2 + w / 2]);
  }
};

// And of N: the same four k's for t = q + 8 n.
template <class E, int kTiles>
struct BorderStep {
  static constexpr int kPlanes = ThinShape<E, kTiles>::kPlanes;
  using Operands = MatrixOperand<bfloat16>[kTiles][kPlanes];
  Vec<float, 4> n[2 * kTiles];

  __device__ __forceinline__ void operands(Operands& planes) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = n[2 * t + e / 2 % 2][e / 4 * 2 + e % 2];
      split(values, planes[t]);
    }
  }
};

template <class E, int kTiles>
using ThinSums = MatrixSums[ThinShape<E, kTiles>::kOuterTiles][kTiles];

template <class T>
__device__ __forceinline__ T load_at(const char* base, uint32_t offset) {
  return load(reinterpret_cast<const T*>(base + offset));
}

// Loads the steps of a warp: of S, whose rows begin at `outer`, or of X, whose columns do and whose
// k's begin with row `begin`. Indices beyond the last row, vector of columns, row of the border or
// k are those of the last one: what they add is not stored, and N is 0 for k's from `count` on.
// Offsets from a pointer are 32-bit numbers.
template <class E, int kTiles, bool kRows>
class Fetch {
 public:
  using S = ThinShape<E, kTiles>;

  // From row `first_border` of the border on.
  __device__ Fetch(const StepLayer& l, const SideShape& side, const float* border, int first_border,
                   int outer, int begin, int count)
      : count_(count), pitch_(l.gradient_pitch * kBytes) {
    const int base = kRows ? min(outer, l.rows - 1) : begin;
    const int last_row = l.rows - 1 - base, last_column = l.weight_columns() - 4;
    gradient_ = static_cast<const char*>(l.gradient) + int64_t{base} * pitch_;
#pragma unroll
    for (int n = 0; n < kLines; ++n) {
      lines_[n] = kRows ? min(8 * n + q(), last_row) * pitch_
                        : min(outer + 32 * n + 4 * q(), last_column) * kBytes;
    }
    border_ = reinterpret_cast<const char*>(border + 4 * p()) + (kRows ? 0 : begin * 4);
    const uint32_t border_pitch = static_cast<uint32_t>(padded(kRows ? l.columns : l.rows)) * 4;
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      border_rows_[n] = min(first_border + q() + 8 * n, side.width - 1) * border_pitch;
    }
  }

  __device__ __forceinline__ void load_step(int k, GradientStep<E, kTiles>& step) const {
    if constexpr (kRows) {
      const char* const from = gradient_ + min(k + 4 * p(), count_ - 4) * kBytes;
#pragma unroll
      for (int n = 0; n < kLines; ++n) step.g[n] = load_at<Numbers>(from, lines_[n]);
    } else {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint32_t row = min(k + 4 * p() + m, count_ - 1) * pitch_;
#pragma unroll
        for (int n = 0; n < kLines; ++n) {
          step.g[4 * n + m] = load_at<Numbers>(gradient_, row + lines_[n]);
        }
      }
    }
  }
  __device__ __forceinline__ void load_step(int k, BorderStep<E, kTiles>& step) const {
    const char* const from = border_ + k * 4;
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      step.n[n] = load_at<Vec<float, 4>>(from, border_rows_[n]);
    }
    if (k + kMatrix > count_) clear_rest(count_ - k - 4 * p(), step);
  }

 private:
  using Numbers = typename GradientStep<E, kTiles>::Numbers;
  static constexpr int kBytes = sizeof(typename S::Stored);
  // Rows of S, or of X the columns of four vectors.
  static constexpr int kLines = kRows ? S::kVectors : S::kVectors / 4;

  const char *gradient_, *border_;
  uint32_t lines_[kLines], border_rows_[2 * kTiles];
  const int count_;
  const uint32_t pitch_;

  static __device__ int q() { return threadIdx.x % kWarp / 4; }
  static __device__ int p() { return threadIdx.x % kWarp % 4; }

  // What the workspace holds beyond the last k is no number.
  static __device__ __forceinline__ void clear_rest(int count, BorderStep<E, kTiles>& step) {
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e >= count) step.n[n][e] = 0;
      }
    }
  }
};

}  // namespace singd::cuda
