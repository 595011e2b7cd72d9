// Gram products of row tiles. A block of 8 warps stages rows of X in shared memory, as tiles of 16
// consecutive columns, and multiplies a list of pairs of tiles: per pair a 16 x 16 sum
//
//   C[i, j] = sum over rows r of X[r, 16 a + i] X[r, 16 b + j].
//
// The warps are row groups x pair groups: a warp owns up to 5 pairs, and every `row_groups`-th
// slice of the staged rows. Rows go through a ring of stages: while one is multiplied, those behind
// it are on their way. bfloat16 and float16 go through the tensor cores (matrix.cuh, float sums);
// float32, float64 and float16 beside a float32 border are multiplied in the compute type. A
// float32 border beside bfloat16 rows goes through the tensor cores too, exactly: as three planes
// of bfloat16 tiles that add up to it.
//
// Stage: 64 rows of 2-byte elements, 32 of float, 16 of double, by 8 tiles (128 columns), or twice
// the rows by 4 tiles where that would make a grid of too few blocks. If there is a border, 4 tiles
// of it lie beside the 8 or 4 of as many rows, or planes of them beside 32 rows. Rows in shared
// memory are padded by 16 bytes: reads of 8 rows x 16 bytes meet no bank twice.
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
// which there are kPlanes planes; such pairs come first.
template <class T, int kPlanes>
struct MmaSums {
  MatrixSums sums[kPairsPerWarp];
  int first[kPairsPerWarp], second[kPairsPerWarp];  // bytes to the lane's rows of the tiles
  int count, borders;                               // pairs, and those of them with a border tile

  __device__ __forceinline__ void begin(const int* pairs, int pair_count, int stride) {
    count = pair_count;
    borders = 0;
#pragma unroll
    for (int q = 0; q < kPairsPerWarp; ++q) {
      const int pair = q < count ? shared_load(pairs + q) : 0;
      first[q] = held((left_row(stride) + first_of_pair(pair) * kTile) * kSize);
      second[q] = held((right_row(stride) + second_of_pair(pair) * kTile) * kSize);
      borders += q < count && first_of_pair(pair) < kBorderTiles ? 1 : 0;
    }
  }

  // Rows 16 group, 16 (group + groups), ... of the stage.
  template <int kRows>
  __device__ __forceinline__ void multiply(const T* stage, int stride, int group, int groups) {
    for (int r = group * kTile; r < kRows; r += groups * kTile) {
      const T* const rows = stage + r * stride;
      multiply_plane(rows, 0, stride, count);
#pragma unroll
      for (int p = 1; p < kPlanes; ++p) {
        multiply_plane(rows, p * kBorderTiles * kTile, stride, borders);
      }
    }
  }

  template <int kPair>
  __device__ __forceinline__ void write(float* to) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const Vec<float, 2> values{{sums[kPair].values[e], sums[kPair].values[e + 1]}};
      float* const at = to + matrix_row(lane, e) * kExchangeStride + matrix_column(lane, e);
      shared_store(reinterpret_cast<Vec<float, 2>*>(at), values);
    }
  }

 private:
  static constexpr int kSize = static_cast<int>(sizeof(T));

  static __device__ __forceinline__ const T* at(const T* rows, int bytes) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(rows) + bytes);
  }

  // The first tiles of the first `pairs` pairs are those of a plane.
  __device__ __forceinline__ void multiply_plane(const T* rows, int plane, int stride, int pairs) {
    MatrixOperand<T> a, b;
#pragma unroll
    for (int q = 0; q < kPairsPerWarp; ++q) {
      if (q >= pairs) break;
      if (q == 0 || first[q] != first[q - 1]) {
        load_left_row(a, at(rows + plane, first[q]), stride);
      }
      load_right_row(b, at(rows, second[q]), stride);
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
  int pairs[kPairsPerWarp], count;

  static __device__ __forceinline__ bool is_square(int pair) {
    return kSquares && first_of_pair(pair) == second_of_pair(pair);
  }

  __device__ __forceinline__ void begin(const int* list, int pair_count, int /*stride*/) {
    count = pair_count;
#pragma unroll
    for (int q = 0; q < kPairsPerWarp; ++q) {
      pairs[q] = q < count ? shared_load(list + q) : 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[q][e] = T(0);
    }
  }

  // Rows group, group + groups, ... of the stage.
  template <int kRows>
  __device__ __forceinline__ void multiply(const T* stage, int stride, int group, int groups) {
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

  template <int kPair>
  __device__ __forceinline__ void write(T* to) const {
    const int lane = threadIdx.x % kWarp;
    if (is_square(pairs[kPair])) {
      if (lane < kTile) shared_store(to + lane * kExchangeStride + lane, sums[kPair][0]);
      return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = lane / 8 * 4 + e / 2, j = lane % 8 * 2 + e % 2;
      shared_store(to + i * kExchangeStride + j, sums[kPair][e]);
    }
  }
};

// The most row groups, up to `limit`, that leave every warp at most 5 pairs.
__device__ inline int row_groups_for(int pair_count, int limit) {
  int groups = limit;
  while (groups > 1 && pair_count * groups > kMaxPairs) groups /= 2;
  return groups;
}

// The pairs and the slices of the staged rows that are the warp's.
struct WarpShare {
  int pair_count, row_groups, pair_groups;  // of the block; groups are powers of two
  int row_group, pair_group, per_warp, first, count;

  __device__ __forceinline__ WarpShare(int pair_count, int most_row_groups)
      : pair_count(pair_count), row_groups(row_groups_for(pair_count, most_row_groups)) {
    const int warp = threadIdx.x / kWarp;
    pair_groups = kGramWarps / row_groups;
    row_group = held(warp * row_groups / kGramWarps);
    per_warp = (pair_count + pair_groups - 1) / pair_groups;
    pair_group = warp % pair_groups;
    first = pair_group * per_warp;
    const int left = pair_count - first;
    count = left < 0 ? 0 : left < per_warp ? left : per_warp;
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
  static constexpr int kWideRows = 128 / static_cast<int>(sizeof(Stage));
  static constexpr int kRows = kPlanes > 1 ? 32
                               : kBordered ? kWideRows
                                           : kWideRows * (kWidePanel / kPanel);
  static constexpr int kRowGroups = kMma && kRows / kTile < 8 ? kRows / kTile : 8;  // at most
  static constexpr int kPanelStart = kBordered ? kPlanes * kBorderTiles : 0;
  static constexpr int kStride = (kPanelStart + kPanel) * kTile + kVector<Stage>;
  static constexpr int kStageSize = kRows * kStride;
  static constexpr int kStageBytes = kStageSize * static_cast<int>(sizeof(Stage));
  static constexpr int kRing = 3;                            // stages
  static constexpr int kExchange = kTile * kExchangeStride;  // of one pair
  // Pairs of a warp that meet at a time.
  static constexpr int kExchanged = sizeof(A) == 8 ? 2 : kPairsPerWarp;
  static constexpr int kExchangeBytes =
      kGramWarps * kExchanged * kExchange * static_cast<int>(sizeof(A));
  static constexpr int kRingBytes = kRing * kStageBytes;
  static constexpr int kSharedBytes = kRingBytes > kExchangeBytes ? kRingBytes : kExchangeBytes;

  struct Input {
    const Rows *x, *border;
    TileRuns panel_runs, border_runs;
    int64_t begin, end;  // rows
    int* pairs;          // kMaxPairs in shared memory
  };

  // list() writes the pairs, returns their number and ends with a barrier; the first rows are on
  // their way meanwhile. write(a, b, j) gives what takes the entries of column j of a pair, put(i,
  // sum); neighbouring threads have neighbouring j. Pairs of different tiles also come mirrored,
  // (b, a), where kMirror.
  template <bool kMirror, class List, class Write>
  static __device__ __forceinline__ void run(const Input& in, List list, Write write) {
    Stage* const ring = dynamic_shared<Stage>();
    Feeds feeds(in);
    const int stages = (static_cast<int>(in.end - in.begin) + kRows - 1) / kRows;
#pragma unroll 1
    for (int n = 0; n < kRing - 1; ++n) feeds.next(ring + n * kStageSize, n < stages);
    const WarpShare share(list(), kRowGroups);
    Sums sums;
    sums.begin(in.pairs + share.first, share.count, kStride);

    int stage = 0, free = kRing - 1;
    for (int n = 0; n < stages; ++n) {
      wait_for_copies<kRing - 2>();
      __syncthreads();
      feeds.next(ring + free * kStageSize, n + kRing - 1 < stages);
      sums.template multiply<kRows>(ring + stage * kStageSize, kStride, share.row_group,
                                    share.row_groups);
      free = stage;
      stage = stage + 1 == kRing ? 0 : stage + 1;
    }
    __syncthreads();
    add_and_write<kMirror>(in.pairs, share, sums, write);
  }

 private:
  // Rows of the border, if there is one, beside rows of the panel.
  struct PanelFeed {
    RowFeed<T, Stage, kRows, kPanel, 1, kAccess, Cache::kStreaming> panel;

    __device__ __forceinline__ explicit PanelFeed(const Input& in)
        : panel(*in.x, in.panel_runs, in.begin, in.end) {}
    __device__ __forceinline__ void next(Stage* stage, bool exists) {
      if (exists) panel.next(stage, kStride);
      commit_copies();
    }
  };
  struct BorderedFeed {
    RowFeed<B, Stage, kRows, kBorderTiles, kPlanes, kAccess, Cache::kNormal> border;
    RowFeed<T, Stage, kRows, kPanel, 1, kAccess, Cache::kStreaming> panel;

    __device__ __forceinline__ explicit BorderedFeed(const Input& in)
        : border(*in.border, in.border_runs, in.begin, in.end),
          panel(*in.x, in.panel_runs, in.begin, in.end) {}
    __device__ __forceinline__ void next(Stage* stage, bool exists) {
      if (exists) {
        border.next(stage, kStride);
        panel.next(stage + kPanelStart * kTile, kStride);
      }
      commit_copies();
    }
  };
  using Feeds = std::conditional_t<kBordered, BorderedFeed, PanelFeed>;

  static constexpr int kRowsPerPut = 4;  // entries of a column that a thread takes
  static constexpr int kRowStep = kTile / kRowsPerPut;
  static constexpr int kPairThreads = kTile * kRowStep;

  // The warps' sums meet in shared memory, up to kExchanged pairs of each at a time.
  template <bool kMirror, class Write>
  static __device__ __forceinline__ void add_and_write(const int* pairs, const WarpShare& share,
                                                       const Sums& sums, Write write) {
    A* const exchange = dynamic_shared<A>();
    const int i = threadIdx.x / kTile % kRowStep, j = threadIdx.x % kTile;
    int q = 0;
    do {
      const int left = share.per_warp - q, width = left < kExchanged ? left : kExchanged;
      const int slots = share.pair_groups * width, step = slots * kExchange;
      give<0>(sums, share, q,
              exchange + (share.row_group * slots + share.pair_group * width) * kExchange);
      __syncthreads();
#pragma unroll 1
      for (int slot = threadIdx.x / kPairThreads; slot < slots;
           slot += kGramThreads / kPairThreads) {
        int n = slot;
        if (kExchanged < kPairsPerWarp) n = slot / width * share.per_warp + q + slot % width;
        if (n >= share.pair_count) break;
        const int pair = shared_load(pairs + n);
        const int a = first_of_pair(pair), b = second_of_pair(pair);
        const A* const from = exchange + slot * kExchange;
        put_column<kExchangeStride>(from + i * kExchangeStride + j, step, share.row_groups, i,
                                    write(a, b, j));
        if (kMirror && a != b) {
          put_column<1>(from + j * kExchangeStride + i, step, share.row_groups, i, write(b, a, j));
        }
      }
      __syncthreads();
      q += kExchanged;
    } while (kExchanged < kPairsPerWarp && q < share.per_warp);
  }

  // The warp's pairs from number `first` on, kExchanged of them.
  template <int kPair>
  static __device__ __forceinline__ void give(const Sums& sums, const WarpShare& share, int first,
                                              A* to) {
    if (kPair >= first && kPair < first + kExchanged && kPair < share.count) {
      sums.template write<kPair>(to + (kPair - first) * kExchange);
    }
    if constexpr (kPair + 1 < kPairsPerWarp) give<kPair + 1>(sums, share, first, to);
  }

  // put(row, sum) for rows i, i + kRowStep, ...; rows are kApart apart in memory: sums over row
  // groups, in order.
  template <int kApart, class Put>
  static __device__ __forceinline__ void put_column(const A* from, int step, int row_groups, int i,
                                                    Put put) {
    A sum[kRowsPerPut];
#pragma unroll
    for (int r = 0; r < kRowsPerPut; ++r) sum[r] = shared_load(from + r * kRowStep * kApart);
#pragma unroll 1
    for (int g = 1; g < row_groups; ++g) {
      from += step;
#pragma unroll
      for (int r = 0; r < kRowsPerPut; ++r) sum[r] += shared_load(from + r * kRowStep * kApart);
    }
#pragma unroll
    for (int r = 0; r < kRowsPerPut; ++r) put(i + r * kRowStep, sum[r]);
  }
};

}  // namespace singd::cuda
