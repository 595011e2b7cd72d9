// Gram products of row tiles. A block of 8 warps stages rows of X in shared memory, as tiles of 16
// consecutive columns, and multiplies a list of pairs of tiles: per pair a 16 x 16 sum
//
//   C[i, j] = sum over rows r of X[r, 16 a + i] X[r, 16 b + j].
//
// The warps are row groups x pair groups: a warp owns up to 5 pairs, and every `row_groups`-th
// slice of the staged rows. While a stage is multiplied, the 16-byte vectors of the next one are on
// their way to registers. bfloat16 and float16 go through the tensor cores (matrix.cuh, float
// sums); float32, float64 and float16 beside a float32 border are multiplied in the compute type. A
// float32 border beside bfloat16 rows goes through the tensor cores too, exactly: as three planes
// of bfloat16 tiles that add up to it.
//
// Tile: 64 rows of 2-byte elements, 32 of float, 16 of double, by 8 tiles (128 columns), or twice
// the rows by 4 tiles where that would make a grid of too few blocks; beside 4 border tiles if
// there is a border. Rows in shared memory are padded by 16 bytes: reads of 8 rows x 16 bytes meet
// no bank twice.
#pragma once

#include "matrix.cuh"
#include "row_stager.cuh"

namespace singd::cuda {

constexpr int kGramWarps = kGramThreads / kWarp;
constexpr int kPairsPerWarp = 5;
constexpr int kMaxPairs = kGramWarps * kPairsPerWarp;
constexpr int kWidePanel = 8, kNarrowPanel = 4;  // tiles of a panel
constexpr int kBorderTiles = 4;
constexpr int kExchangeStride = 20;  // of the rows of a 16 x 16 sum: 16-byte steps, few conflicts

SINGD_HOST_DEVICE constexpr int pack_pair(int a, int b) { return a | b << 8; }
SINGD_HOST_DEVICE constexpr int first_of_pair(int pair) { return pair & 255; }
SINGD_HOST_DEVICE constexpr int second_of_pair(int pair) { return pair >> 8; }

// The sums of one warp, through the tensor cores. The first tile of a pair may be a border tile, of
// which there are kPlanes planes.
template <class T, int kPlanes>
struct MmaSums {
  MatrixSums sums[kPairsPerWarp];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int q = 0; q < kPairsPerWarp; ++q) sums[q] = MatrixSums();
  }

  // Rows 16 group, 16 (group + groups), ... of the stage.
  template <int kRows>
  __device__ __forceinline__ void multiply(const T* stage, int stride,
                                           const int (&pairs)[kPairsPerWarp], int count, int group,
                                           int groups) {
    for (int r = group * kTile; r < kRows; r += groups * kTile) {
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) multiply_plane(stage + r * stride, stride, pairs, count, p);
    }
  }

  __device__ __forceinline__ void write(int q, int /*pair*/, float* to) const {
#pragma unroll
    for (int n = 0; n < kPairsPerWarp; ++n) {
      if (n != q) continue;
      const int lane = threadIdx.x % kWarp;
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        const Vec<float, 2> pair{{sums[n].values[e], sums[n].values[e + 1]}};
        float* const at = to + matrix_row(lane, e) * kExchangeStride + matrix_column(lane, e);
        shared_store(reinterpret_cast<Vec<float, 2>*>(at), pair);
      }
    }
  }

 private:
  __device__ __forceinline__ void multiply_plane(const T* rows, int stride,
                                                 const int (&pairs)[kPairsPerWarp], int count,
                                                 int plane) {
    MatrixOperand<T> a, b;
    int loaded = -1;
#pragma unroll
    for (int q = 0; q < kPairsPerWarp; ++q) {
      const int first = first_of_pair(pairs[q]);
      if (q >= count || (plane > 0 && first >= kBorderTiles)) continue;
      if (first != loaded) {
        load_left<true>(a, rows + (plane * kBorderTiles + first) * kTile, stride);
        loaded = first;
      }
      load_right<false>(b, rows + second_of_pair(pairs[q]) * kTile, stride);
      cuda::multiply(sums[q], a, b);
    }
  }
};

// The sums of one warp, by multiply-add: a lane owns 4 x 2 entries. Of a pair of equal panel tiles
// beside a border (kSquares) only the diagonal is needed: lane l owns entry (l % 16, l % 16).
template <class T, bool kSquares>
struct FmaSums {
  using Part = Vec<T, 2>;
  T sums[kPairsPerWarp][8];

  static __device__ __forceinline__ bool is_square(int pair) {
    return kSquares && first_of_pair(pair) == second_of_pair(pair);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int q = 0; q < kPairsPerWarp; ++q) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[q][e] = T(0);
    }
  }

  // Rows group, group + groups, ... of the stage.
  template <int kRows>
  __device__ __forceinline__ void multiply(const T* stage, int stride,
                                           const int (&pairs)[kPairsPerWarp], int count, int group,
                                           int groups) {
    const int lane = threadIdx.x % kWarp;
    for (int r = group; r < kRows; r += groups) {
      const T* row = stage + r * stride;
      Part a[2];
      int loaded = -1;
#pragma unroll
      for (int q = 0; q < kPairsPerWarp; ++q) {
        if (q >= count) continue;
        const T* second = row + second_of_pair(pairs[q]) * kTile;
        if (is_square(pairs[q])) {
          const T x = shared_load(second + lane % kTile);
          sums[q][0] += x * x;
          continue;
        }
        if (first_of_pair(pairs[q]) != loaded) {
          loaded = first_of_pair(pairs[q]);
          const T* first = row + loaded * kTile + lane / 8 * 4;
          a[0] = shared_load(reinterpret_cast<const Part*>(first));
          a[1] = shared_load(reinterpret_cast<const Part*>(first + 2));
        }
        const Part b = shared_load(reinterpret_cast<const Part*>(second + lane % 8 * 2));
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[q][e] += a[e / 4][e / 2 % 2] * b[e % 2];
      }
    }
  }

  __device__ __forceinline__ void write(int q, int pair, T* to) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kPairsPerWarp; ++n) {
      if (n != q) continue;
      if (is_square(pair)) {
        if (lane < kTile) shared_store(to + lane * kExchangeStride + lane, sums[n][0]);
        continue;
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int i = lane / 8 * 4 + e / 2, j = lane % 8 * 2 + e % 2;
        shared_store(to + i * kExchangeStride + j, sums[n][e]);
      }
    }
  }
};

// One kernel's types and sizes. T: rows of X; B: rows of the border, void if there is none. The
// border's tiles come first in the stage, then the kPanel tiles of the panel.
template <class T, class B, int kPanel, RowAccess kAccess>
struct GramTiles {
  using A = compute_t<T>;
  static constexpr bool kBordered = !std::is_void_v<B>;
  static constexpr int kPlanes = std::is_same_v<T, bfloat16> && std::is_same_v<B, float> ? 3 : 1;
  static constexpr bool kMma =
      sizeof(T) == 2 && (!kBordered || std::is_same_v<T, B> || kPlanes > 1);
  using Stage = std::conditional_t<kMma, T, A>;
  using Sums = std::conditional_t<kMma, MmaSums<T, kPlanes>, FmaSums<A, kBordered>>;
  static constexpr int kRows =
      128 / static_cast<int>(sizeof(Stage)) * (kPlanes > 1 ? 1 : kWidePanel / kPanel);
  static constexpr int kRowGroups = kMma && kRows / kTile < 8 ? kRows / kTile : 8;  // at most
  static constexpr int kPanelStart = kBordered ? kPlanes * kBorderTiles : 0;
  static constexpr int kStride = (kPanelStart + kPanel) * kTile + kVector<Stage>;
  static constexpr int kExchange = kTile * kExchangeStride;  // of one warp
  static constexpr int kStageBytes = kRows * kStride * static_cast<int>(sizeof(Stage));
  static constexpr int kExchangeBytes = kGramWarps * kExchange * static_cast<int>(sizeof(A));
  static constexpr int kSharedBytes = kStageBytes > kExchangeBytes ? kStageBytes : kExchangeBytes;

  struct Input {
    Rows x, border;
    TileRuns panel_runs, border_runs;
    int64_t begin, end;  // rows
    const int* pairs;    // in shared memory
    int pair_count;
    int row_groups;  // that leave every warp at most 5 pairs
  };

  // write(a, b, i, j, sum) for every entry of every pair, by neighbouring threads for neighbouring
  // j; pairs of different tiles also come mirrored, (b, a, j, i), where kMirror.
  template <bool kMirror, class Write>
  static __device__ __forceinline__ void run(const Input& in, Write write) {
    unsigned char* memory = dynamic_shared<unsigned char>();
    const int warp = threadIdx.x / kWarp;
    const int pair_groups = kGramWarps / in.row_groups;
    const int per_warp = (in.pair_count + pair_groups - 1) / pair_groups;
    const int first_pair = warp % pair_groups * per_warp;
    const int left = in.pair_count - first_pair;
    const int count = left < 0 ? 0 : left < per_warp ? left : per_warp;
    int pairs[kPairsPerWarp];
#pragma unroll
    for (int q = 0; q < kPairsPerWarp; ++q) {
      pairs[q] = q < count ? shared_load(in.pairs + first_pair + q) : 0;
    }

    Sums sums;
    sums.clear();
    Stage* stage = reinterpret_cast<Stage*>(memory);
    Stager<T, Stage, kRows, kPanel, 1, kAccess> panel;
    Stager<std::conditional_t<kBordered, B, T>, Stage, kRows, kBorderTiles, kPlanes, kAccess>
        border;
    const auto fetch = [&](int64_t row) {
      if constexpr (kBordered) border.fetch(in.border, in.border_runs, row, in.end);
      panel.fetch(in.x, in.panel_runs, row, in.end);
    };
    fetch(in.begin);
    for (int64_t row = in.begin; row < in.end; row += kRows) {
      if constexpr (kBordered) {
        border.put(in.border, in.border_runs, row, in.end, stage, kStride);
      }
      panel.put(in.x, in.panel_runs, row, in.end, stage + kPanelStart * kTile, kStride);
      __syncthreads();
      if (row + kRows < in.end) fetch(row + kRows);
      sums.template multiply<kRows>(stage, kStride, pairs, count, warp / pair_groups,
                                    in.row_groups);
      __syncthreads();
    }

    A* exchange = reinterpret_cast<A*>(memory);
    for (int q = 0; q < per_warp; ++q) {
      if (q < count) sums.write(q, pairs_at(pairs, q), exchange + warp * kExchange);
      __syncthreads();
      for (int n = threadIdx.x; n < pair_groups * kTile * kTile; n += kGramThreads) {
        const int group = n / (kTile * kTile), i = n / kTile % kTile, j = n % kTile;
        if (group * per_warp + q >= in.pair_count || q >= per_warp) continue;
        const int pair = shared_load(in.pairs + group * per_warp + q);
        const int a = first_of_pair(pair), b = second_of_pair(pair);
        const A* from = exchange + group * kExchange;
        const int step = pair_groups * kExchange;
        write(a, b, i, j, total(from + i * kExchangeStride + j, step, in.row_groups));
        if (kMirror && a != b) {
          write(b, a, i, j, total(from + j * kExchangeStride + i, step, in.row_groups));
        }
      }
      __syncthreads();
    }
  }

 private:
  static __device__ __forceinline__ int pairs_at(const int (&pairs)[kPairsPerWarp], int q) {
    int pair = 0;
#pragma unroll
    for (int n = 0; n < kPairsPerWarp; ++n) pair = n == q ? pairs[n] : pair;
    return pair;
  }

  // The sum over row groups, in order.
  static __device__ __forceinline__ A total(const A* from, int step, int row_groups) {
    A sum = A(0);
    for (int g = 0; g < row_groups; ++g) sum += shared_load(from + g * step);
    return sum;
  }
};

// The most row groups, up to `limit`, that leave every warp at most 5 pairs.
__device__ inline int row_groups_for(int pair_count, int limit) {
  int groups = limit;
  while (groups > 1 && pair_count * groups > kMaxPairs) groups /= 2;
  return groups;
}

}  // namespace singd::cuda
