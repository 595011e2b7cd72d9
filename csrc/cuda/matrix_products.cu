// The thin products of layers with a bordered side on the tensor cores, for float32 and 16-bit
// layers that move in vectors (thin_products.cu has the others), N of width b <= 64:
//
//   matrix_products   S = G N_K^T (rows x b), the partial sums of X = N_C G (b x columns) over
//                     strips of rows, and max |G|
//   thin_sums         X, and the border rows of G for a row-bordered C
//
// A block owns a strip of 128 rows and walks along it in chunks of 64 columns (half as many for
// float32, and again for wide borders), the next one loaded into registers while the current one,
// in shared memory as planes of bfloat16 (planes.cuh), is multiplied. Its warps own rows of S,
// whose sums stay in registers along the strip, and of each chunk's X a tile of 16 x 16 or two.
//
// Bytes: G once, and the partial sums of X twice: 4 b for the bytes of a column of the strip, which
// is why C's borders are narrow.
#include <algorithm>

#include "planes.cuh"
#include "step.cuh"

namespace singd::cuda {
namespace {

constexpr int kWarps = kStepThreads / kWarp;
constexpr int kPad = 8;

// kTiles: the most border tiles of a K in the launch.
template <class E, int kTiles>
struct Shape {
  static constexpr int kGradientPlanes = kStoredPlanes<typename E::Stored>;
  static constexpr int kPlanes = kComputePlanes<typename E::Stored>;
  static constexpr int kRows = 128;
  static constexpr int kChunk = (sizeof(typename E::Stored) == 4 ? 32 : 64) / (kTiles > 2 ? 2 : 1);
  static constexpr int kChunkTiles = kChunk / kMatrix;
  static constexpr int kPitch = kChunk + kPad;
  static constexpr int kRowTiles = kRows / kMatrix / kWarps;  // of a warp
  static constexpr int kLeftPitch = kRows + kPad;
};

SINGD_HOST_DEVICE inline int border_tiles(const SideShape& side) {
  return side.bordered() ? (side.width + kMatrix - 1) / kMatrix : 0;
}

// Whether the partial sums of X are few bytes beside the rows'.
inline bool is_narrow(const StepLayer& l) {
  constexpr int kNarrow = 8;
  return !l.left.bordered() || l.left.width <= kNarrow;
}

// Arrays of bfloat16 in shared memory: planes of the chunk, of N_K in its columns as [t, column],
// and of N_C in the strip's rows as [t, row].
template <class E, int kTiles>
struct Arrays {
  int right, right_plane, left, left_plane, size;

  SINGD_HOST_DEVICE explicit Arrays(const StepLayer& l) {
    using S = Shape<E, kTiles>;
    right = S::kGradientPlanes * S::kRows * S::kPitch;
    right_plane = border_tiles(l.right) * kMatrix * S::kPitch;
    left = right + S::kPlanes * right_plane;
    left_plane = border_tiles(l.left) * kMatrix * S::kLeftPitch;
    size = left + S::kPlanes * left_plane;
  }
};

template <class E, int kTiles>
class StripProducts {
 public:
  using S = Shape<E, kTiles>;

  __device__ StripProducts(const StepLayer& layer, int strip)
      : l(layer),
        arrays(layer),
        offsets(layer),
        workspace(static_cast<float*>(layer.workspace)),
        shared(dynamic_shared<bfloat16>()),
        strip(strip),
        first_row(strip * S::kRows) {}

  // Returns the largest magnitude that this thread has read.
  __device__ __forceinline__ int run() {
    MatrixSums s[S::kRowTiles][kTiles];
    int largest = 0;
    if (l.left.bordered()) stage_left();
    fetch(0);
    for (int column = 0; column < l.columns; column += S::kChunk) {
      largest = max(largest, commit(column));
      if (l.right.bordered()) stage_right(column);
      __syncthreads();
      if (column + S::kChunk < l.columns) fetch(column + S::kChunk);
      if (l.right.bordered()) multiply_right(s);
      if (l.left.bordered()) multiply_left(column);
      __syncthreads();
    }
    if (l.right.bordered()) store_right(s);
    return largest;
  }

 private:
  static constexpr int kCount = E::kCount, kAcross = S::kChunk / kCount;
  static constexpr int kVectors = S::kRows * kAcross / kStepThreads;

  const StepLayer& l;
  const Arrays<E, kTiles> arrays;
  const StepOffsets offsets;
  float* const workspace;
  bfloat16* const shared;
  const int strip, first_row;
  Vec<typename E::Stored, kCount> next[kVectors];

  static __device__ int lane() { return threadIdx.x % kWarp; }
  static __device__ int warp() { return threadIdx.x / kWarp; }

  // The vectors of a chunk that a thread owns: f(number, row in the strip, columns).
  template <class Function>
  __device__ __forceinline__ void for_each_vector(int column, Function&& f) const {
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const int at = n * kStepThreads + threadIdx.x, j = column + at % kAcross * kCount;
      const int row = at / kAcross;
      f(n, row, Columns{j, 0, first_row + row < l.rows ? min(kCount, l.columns - j) : 0});
    }
  }

  __device__ __forceinline__ void fetch(int column) {
    for_each_vector(column, [&](int n, int row, const Columns& c) {
      if (is_gradient_vector<E>(l, c)) next[n] = gradient_vector<E>(l, first_row + row, c);
    });
  }

  // What was fetched, and what moves element by element, to shared memory.
  __device__ __forceinline__ int commit(int column) {
    int largest = 0;
    for_each_vector(column, [&](int n, int row, const Columns& c) {
      bfloat16* const to = shared + row * S::kPitch + c.j - column;
      if (is_gradient_vector<E>(l, c)) {
        Vec<bfloat16, kCount> parts[S::kGradientPlanes];
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const float value = widen<float>(next[n][e]);
          largest = max(largest, magnitude(value));
          bfloat16 planes[S::kGradientPlanes];
          split(value, planes);
#pragma unroll
          for (int p = 0; p < S::kGradientPlanes; ++p) parts[p][e] = planes[p];
        }
#pragma unroll
        for (int p = 0; p < S::kGradientPlanes; ++p) {
          shared_store(reinterpret_cast<Vec<bfloat16, kCount>*>(to + p * S::kRows * S::kPitch),
                       parts[p]);
        }
        return;
      }
#pragma unroll 1
      for (int e = 0; e < kCount; ++e) {
        const float value = e < c.end ? load_gradient<E>(l, first_row + row, c.j + e) : 0.0f;
        largest = max(largest, magnitude(value));
        bfloat16 planes[S::kGradientPlanes];
        split(value, planes);
#pragma unroll
        for (int p = 0; p < S::kGradientPlanes; ++p) {
          shared_store(to + p * S::kRows * S::kPitch + e, planes[p]);
        }
      }
    });
    return largest;
  }

  // N[t, first ...] of a side with `tiles` tiles of borders, in rows of kLength, zero beyond it.
  template <int kLength>
  __device__ __forceinline__ void stage(const SideShape& side, const float* n, int64_t dim,
                                        int64_t first, bfloat16* to, int plane) const {
    const int count = border_tiles(side) * kMatrix * kLength;
#pragma unroll 2
    for (int at = threadIdx.x; at < count; at += kStepThreads) {
      const int t = at / kLength, k = at % kLength;
      const bool inside = t < side.width && first + k < dim;
      bfloat16 planes[S::kPlanes];
      split(inside ? load(n + t * padded(dim) + first + k) : 0.0f, planes);
#pragma unroll
      for (int p = 0; p < S::kPlanes; ++p) {
        shared_store(to + p * plane + t * (kLength + kPad) + k, planes[p]);
      }
    }
  }
  __device__ __forceinline__ void stage_right(int column) const {
    stage<S::kChunk>(l.right, workspace + offsets.right_n, l.columns, column, shared + arrays.right,
                     arrays.right_plane);
  }
  __device__ __forceinline__ void stage_left() const {
    stage<S::kRows>(l.left, workspace + offsets.left_n, l.rows, first_row, shared + arrays.left,
                    arrays.left_plane);
  }

  __device__ int row_tile(int n) const { return warp() * S::kRowTiles + n; }

  // The chunk's part of S in the warp's rows.
  __device__ __forceinline__ void multiply_right(MatrixSums (&s)[S::kRowTiles][kTiles]) const {
    const int tiles = border_tiles(l.right);
#pragma unroll 1
    for (int k = 0; k < S::kChunk; k += kMatrix) {
#pragma unroll
      for (int n = 0; n < S::kRowTiles; ++n) {
        MatrixOperand<bfloat16> a[S::kGradientPlanes];
#pragma unroll
        for (int p = 0; p < S::kGradientPlanes; ++p) {
          load_left<false>(a[p], shared + (p * S::kRows + row_tile(n) * kMatrix) * S::kPitch + k,
                           S::kPitch);
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (t >= tiles) break;
          const bfloat16* const from = shared + arrays.right + t * kMatrix * S::kPitch + k;
          multiply_planes<S::kPlanes, S::kGradientPlanes, S::kPlanes>(
              s[n][t], a, [&](int q, MatrixOperand<bfloat16>& b) {
                load_right<true>(b, from + q * arrays.right_plane, S::kPitch);
              });
        }
      }
    }
  }

  __device__ __forceinline__ void store_right(const MatrixSums (&s)[S::kRowTiles][kTiles]) const {
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int64_t i = first_row + row_tile(n) * kMatrix + matrix_row(lane(), e);
          const int r = t * kMatrix + matrix_column(lane(), e);
          if (i >= l.rows || r >= l.right.width) continue;
          store(workspace + offsets.products + i * l.right.width + r, s[n][t].values[e]);
        }
      }
    }
  }

  // The strip's part of X in the chunk's columns.
  __device__ __forceinline__ void multiply_left(int column) const {
    const int tasks = border_tiles(l.left) * S::kChunkTiles;
#pragma unroll 1
    for (int task = warp(); task < tasks; task += kWarps) {
      const int t = task / S::kChunkTiles * kMatrix, j = task % S::kChunkTiles * kMatrix;
      MatrixSums x;
#pragma unroll 1
      for (int k = 0; k < S::kRows; k += kMatrix) {
        MatrixOperand<bfloat16> a[S::kPlanes];
#pragma unroll
        for (int p = 0; p < S::kPlanes; ++p) {
          load_left<false>(a[p],
                           shared + arrays.left + p * arrays.left_plane + t * S::kLeftPitch + k,
                           S::kLeftPitch);
        }
        multiply_planes<S::kPlanes, S::kPlanes, S::kGradientPlanes>(
            x, a, [&](int q, MatrixOperand<bfloat16>& b) {
              load_right<false>(b, shared + (q * S::kRows + k) * S::kPitch + j, S::kPitch);
            });
      }
      float* const out = workspace + (l.strips > 1 ? offsets.partial : offsets.thin) +
                         static_cast<int64_t>(strip) * l.left.width * padded(l.columns);
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        const int r = t + matrix_row(lane(), e);
        const int64_t at = column + j + matrix_column(lane(), e);
        if (r >= l.left.width || at >= padded(l.columns)) continue;
        auto* const to = reinterpret_cast<Vec<float, 2>*>(out + r * padded(l.columns) + at);
        const Vec<float, 2> pair{{x.values[e], x.values[e + 1]}};
        store(to, pair);
      }
    }
  }
};

using ThinTable = Table<StepLayer, kMaxStepLayers>;

template <class E, int kTiles>
__global__ void __launch_bounds__(kStepThreads, 2)
    matrix_products_kernel(const __grid_constant__ ThinTable table, const StepArguments a) {
  const StepLayer& l = table.find(blockIdx.x);
  StripProducts<E, kTiles> products(l, static_cast<int>(blockIdx.x - l.first_block));
  raise(counters_of(a, l) + kGradientMagnitude, products.run());
}

// A thread owns an entry of X or of the border rows of G.
template <class E>
__global__ void __launch_bounds__(kStepThreads)
    thin_sums_kernel(const __grid_constant__ ThinTable table) {
  const StepLayer& l = table.find(blockIdx.x);
  const StepOffsets offsets(l);
  float* const workspace = static_cast<float*>(l.workspace);
  const int64_t pitch = padded(l.columns), size = l.left.width * pitch;
  const int64_t at = (blockIdx.x - l.first_block) * kStepThreads + threadIdx.x;
  const int r = static_cast<int>(at / pitch), j = static_cast<int>(at % pitch);
  if (r >= l.thin_rows() || j >= l.columns) return;
  float sum = 0;
  if (r >= l.left.width) {
    sum = load_gradient<E>(l, l.left.border_index(r - l.left.width, l.rows), j);
  } else if (l.strips > 1) {
    for (int n = 0; n < l.strips; ++n) sum += load(workspace + offsets.partial + n * size + at);
  } else {
    return;
  }
  store(workspace + offsets.thin + at, sum);
}

}  // namespace

bool fits_matrix_products(const StepLayer* layers, int count, const StepKind& kind) {
  return kind.uses_matrices && std::all_of(layers, layers + count, is_narrow);
}

void plan_matrix_products(StepLayer& layer, const StepKind& kind) {
  if (!layer.left.bordered() && !layer.right.bordered()) return;
  if (!is_narrow(layer)) return;  // thin_products leaves no partial sums
  dispatch_vectors(kind, [&](auto elements) {
    constexpr int kRows = Shape<decltype(elements), 1>::kRows;
    layer.strips = (layer.rows + kRows - 1) / kRows;
  });
}

void matrix_products(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                     Stream stream) {
  ThinTable table;
  int tiles = 0;
  for (int n = 0; n < count; ++n) tiles = std::max(tiles, border_tiles(layers[n].right));
  dispatch_vectors(kind, [&](auto elements) {
    using E = decltype(elements);
    const auto run = [&](auto most) {
      constexpr int kTiles = decltype(most)::value;
      const int64_t blocks =
          fill(table, layers, count, [](const StepLayer& l) { return l.strips; });
      int size = 0;
      for (int n = 0; n < count; ++n) size = std::max(size, Arrays<E, kTiles>(layers[n]).size);
      launch({"matrix_products", blocks, kStepThreads, stream, size * sizeof(bfloat16)},
             matrix_products_kernel<E, kTiles>, table, a);
    };
    if (tiles <= 1) {
      run(std::integral_constant<int, 1>());
    } else if (tiles == 2) {
      run(std::integral_constant<int, 2>());
    } else {
      run(std::integral_constant<int, 4>());
    }
    const int64_t blocks = fill(table, layers, count, [](const StepLayer& l) {
      return (l.thin_rows() * padded(l.columns) + kStepThreads - 1) / kStepThreads;
    });
    launch({"thin_sums", blocks, kStepThreads, stream}, thin_sums_kernel<E>, table);
  });
}

}  // namespace singd::cuda
