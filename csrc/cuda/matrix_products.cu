// The thin products of layers with a bordered side on the tensor cores, for float32 and 16-bit
// layers that move in vectors (thin_products.cu has the others), N of width b <= 64:
//
//   matrix_products   S = G N_K^T (rows x b), X = N_C G (b x columns) by panels of rows, max |G|
//   thin_sums         X, and the border rows of G for a row-bordered C
//
// A warp owns 32 rows of S, or as many columns of X, and walks along them 16 k's at a time
// (thin_steps.cuh). The warps of a block own different rows or share the k's, whose sums are added
// in a fixed order; with a wide border they share N, which comes from L1 then. The column of a bias
// is no part of a vector: what it adds to S is added last, and blocks of their own make its column
// of X.
//
// Bytes: G once from DRAM and, where both sides are bordered, once more from L2: a panel is as many
// rows as L2 keeps, and its X follows its S.
#include <algorithm>

#include "thin_steps.cuh"

namespace singd::cuda {
namespace {

// The sums of float32 are kept short, since each addition to them rounds.
constexpr int64_t panel_limit(Dtype dtype) { return dtype == Dtype::kFloat32 ? 1024 : 4096; }
constexpr int64_t kPanelBytes = int64_t{16} << 20;

// Rows of a panel, but for the last one.
SINGD_HOST_DEVICE inline int panel_rows(const StepLayer& l) {
  if (l.strips <= 1) return l.rows;
  return ((l.rows - 1) / l.strips / kThinThreads + 1) * kThinThreads;
}

// The order of a layer's blocks: by panels of rows, those of S before those of X, and parts of the
// border side by side.
struct Pieces {
  int row_parts = 1, column_parts = 1;    // of the borders
  int rows = 0, columns = 0, biases = 0;  // blocks of a panel: of S, of X, of its bias column

  SINGD_HOST_DEVICE Pieces(const StepLayer& l, int owned, int part) {
    if (l.right.bordered()) {
      row_parts = count(l.right.width, part);
      rows = count(panel_rows(l), owned) * row_parts;
    }
    if (!l.left.bordered()) return;
    column_parts = count(l.left.width, part);
    columns = count(l.weight_columns(), owned) * column_parts;
    if (l.bias != nullptr) biases = count(l.left.width, kThinWarps);
  }
  SINGD_HOST_DEVICE int of_panel() const { return rows + columns + biases; }

 private:
  SINGD_HOST_DEVICE static int count(int length, int owned) { return (length + owned - 1) / owned; }
};

template <class E, int kTiles>
class ThinProducts {
 public:
  using S = ThinShape<E, kTiles>;
  static constexpr int kPart = kTiles * kMatrix;  // rows of the border

  __device__ explicit ThinProducts(const StepLayer& layer)
      : l(layer), workspace(static_cast<float*>(layer.workspace)) {}

  // Returns the largest magnitude that this thread has seen.
  __device__ __forceinline__ int run(int piece) const {
    const Pieces pieces(l, S::kOwned, kPart);
    const int panel = piece / pieces.of_panel(), inside = piece - panel * pieces.of_panel();
    const int begin = panel * panel_rows(l), end = min(begin + panel_rows(l), l.rows);
    if (inside < pieces.rows) {
      const int first = begin + inside / pieces.row_parts * S::kOwned;
      const int border = inside % pieces.row_parts * kPart;
      int bias = 0;
      const int weight = multiply<true>(l.right, border, first, 0, l.weight_columns(),
                                        [&](ThinSums<E, kTiles>& sums, int outer) {
                                          bias = store_rows(sums, border, outer, end);
                                        });
      return max(weight, bias);
    }
    const int number = inside - pieces.rows;
    if (number >= pieces.columns) return multiply_bias(number - pieces.columns, begin, end, panel);
    const int first = number / pieces.column_parts * S::kOwned;
    const int border = number % pieces.column_parts * kPart;
    return multiply<false>(l.left, border, first, begin, end,
                           [&](const ThinSums<E, kTiles>& sums, int outer) {
                             store_columns(sums, border, outer, panel);
                           });
  }

 private:
  const StepLayer& l;
  float* const workspace;

  // Made where it is used: few registers are left beside the sums.
  __device__ StepOffsets offsets() const { return StepOffsets(l); }
  static __device__ int lane() { return threadIdx.x % kWarp; }
  static __device__ int warp() { return threadIdx.x / kWarp; }

  template <bool kRows>
  static __device__ __forceinline__ void multiply_step(
      const typename BorderStep<E, kTiles>::Operands& a, const GradientStep<E, kTiles>& step,
      ThinSums<E, kTiles>& sums) {
#pragma unroll
    for (int n = 0; n < S::kOuterTiles; ++n) {
      MatrixOperand<bfloat16> b[S::kGradientPlanes];
      step.template operand<kRows>(n, b);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) multiply_tile(a[t], b, sums[n][t]);
    }
  }

  // Tensor cores cut off what is below the last bit of a sum, each time they add to it: the sums of
  // float32 are added by other instructions, which round, and the products of smaller planes are
  // summed by themselves.
  static __device__ __forceinline__ void multiply_tile(
      const MatrixOperand<bfloat16> (&a)[S::kPlanes],
      const MatrixOperand<bfloat16> (&b)[S::kGradientPlanes], MatrixSums& sum) {
    if constexpr (S::kPlanes > 2) {
      MatrixSums high, low;
      cuda::multiply(high, a[0], b[0]);
#pragma unroll
      for (int order = S::kPlanes - 1; order > 0; --order) {
#pragma unroll
        for (int p = 0; p <= order; ++p) cuda::multiply(low, a[p], b[order - p]);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) sum.values[e] += high.values[e] + low.values[e];
    } else {
#pragma unroll
      for (int q = 0; q < S::kGradientPlanes; ++q) {
#pragma unroll
        for (int p = 0; p + q < S::kPlanes; ++p) cuda::multiply(sum, a[p], b[q]);
      }
    }
  }

  // The product of G's rows (or columns) from `first` on with rows of the border, over [begin,
  // end).
  template <bool kRows, class Store>
  __device__ __forceinline__ int multiply(const SideShape& side, int first_border, int first,
                                          int begin, int end, Store&& store) const {
    const int outer = first + warp() % S::kGroups * S::kOuter, split = warp() / S::kGroups;
    const int stride = S::stride();
    const float* const border = workspace + (kRows ? offsets().right_n : offsets().left_n);
    const bool inspects = kRows || !l.right.bordered();
    const int count = end - begin;
    const Fetch<E, kTiles, kRows> fetch(l, side, border, first_border, outer, begin, count);
    LargestMagnitude<typename S::Stored> largest;
    ThinSums<E, kTiles> sums;
    BorderStep<E, kTiles> border_step;
    typename BorderStep<E, kTiles>::Operands a;
    GradientStep<E, kTiles> steps[S::kAhead];
    int k = split * kMatrix;
    if (k < count) fetch.load_step(k, border_step);
#pragma unroll
    for (int n = 0; n < S::kAhead; ++n) {
      if (k + n * stride < count) fetch.load_step(k + n * stride, steps[n]);
    }
    while (k < count) {
#pragma unroll
      for (int n = 0; n < S::kAhead; ++n) {
        border_step.operands(a);
        if (k + stride < count) fetch.load_step(k + stride, border_step);
        if (inspects) steps[n].inspect(largest);
        multiply_step<kRows>(a, steps[n], sums);
        const int later = k + S::kAhead * stride;
        if (later < count) fetch.load_step(later, steps[n]);
        k += stride;
        if (k >= count) break;
      }
    }
    add_splits(sums);
    if (split == 0) store(sums, outer);
    return largest.key();
  }

  // The sums of all splits, in those of the first one.
  __device__ __forceinline__ void add_splits(ThinSums<E, kTiles>& sums) const {
    constexpr int kCount = S::kOuterTiles * kTiles * 8;
    __shared__ float slots[kThinWarps / 2][kCount][kWarp];
    const int group = warp() % S::kGroups, split = warp() / S::kGroups;
#pragma unroll
    for (int half = S::kSplits / 2; half > 0; half /= 2) {
      float* const slot = &slots[split % half * S::kGroups + group][0][lane()];
      const auto for_each = [&](auto f) {
#pragma unroll
        for (int n = 0; n < S::kOuterTiles; ++n) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              f(sums[n][t].values[e], slot + ((n * kTiles + t) * 8 + e) * kWarp);
            }
          }
        }
      };
      if (split >= half && split < 2 * half) {
        for_each([](float sum, float* at) { shared_store(at, sum); });
      }
      __syncthreads();
      if (split < half) for_each([](float& sum, const float* at) { sum += shared_load(at); });
      __syncthreads();
    }
  }

  __device__ __forceinline__ float bias(int64_t i) const {
    return load_element<E>(l.gradient_bias, l.gradient_dtype[1], i * l.gradient_bias_pitch);
  }

  // S, with what the bias adds. Returns the largest magnitude of the bias.
  __device__ __forceinline__ int store_rows(const ThinSums<E, kTiles>& sums, int border, int outer,
                                            int end) const {
    const int width = l.right.width;
    const bool has_bias = l.bias != nullptr;
    const float* const n_of_bias = workspace + offsets().right_n + l.weight_columns();
    int largest = 0;
#pragma unroll
    for (int n = 0; n < S::kOuterTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int64_t i = outer + n * kMatrix + matrix_column(lane(), e);
        if (i >= end) continue;
        const float g = has_bias ? bias(i) : 0.0f;
        largest = max(largest, magnitude(g));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int r = border + t * kMatrix + matrix_row(lane(), e);
          if (r >= width) continue;
          float sum = sums[n][t].values[e];
          if (has_bias) sum += g * load(n_of_bias + r * padded(l.columns));
          store(workspace + offsets().products + i * width + r, sum);
        }
      }
    }
    return largest;
  }

  // Where a panel's X belongs.
  __device__ __forceinline__ float* thin(int panel) const {
    const int64_t first = l.strips > 1 ? offsets().partial : offsets().thin;
    return workspace + first + panel * l.left.width * padded(l.columns);
  }

  // X but for the bias: a lane has eight neighbouring columns of a row in each pair of tiles.
  __device__ __forceinline__ void store_columns(const ThinSums<E, kTiles>& sums, int border,
                                                int outer, int panel) const {
    float* const x = thin(panel);
#pragma unroll
    for (int n = 0; n < S::kOuterTiles; n += 2) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = border + t * kMatrix + matrix_row(lane(), e);
          const int j = outer + n * kMatrix + 4 * matrix_column(lane(), e);
          if (r >= l.left.width || j >= l.weight_columns()) continue;
          const MatrixSums &low = sums[n][t], &high = sums[n + 1][t];
          const Vec<float, 4> four{
              {low.values[e], low.values[e + 4], high.values[e], high.values[e + 4]}};
          store(reinterpret_cast<Vec<float, 4>*>(x + r * padded(l.columns) + j), four);
        }
      }
    }
  }

  // The column of X that belongs to the bias: a warp has a row of it.
  __device__ __forceinline__ int multiply_bias(int number, int begin, int end, int panel) const {
    const int r = number * kThinWarps + warp();
    if (r >= l.left.width) return 0;
    const float* const n = workspace + offsets().left_n + r * padded(l.rows);
    float sum = 0;
    int largest = 0;
#pragma unroll 4
    for (int i = begin + lane(); i < end; i += kWarp) {
      const float g = bias(i);
      largest = max(largest, magnitude(g));
      sum += g * load(n + i);
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffU, sum, offset);
    }
    if (lane() == 0) store(thin(panel) + r * padded(l.columns) + l.weight_columns(), sum);
    return largest;
  }
};

using ThinTable = Table<StepLayer, kMaxStepLayers>;

template <class E, int kTiles>
__global__ void __launch_bounds__(kThinThreads, (ThinShape<E, kTiles>::kBlocks))
    matrix_products_kernel(const __grid_constant__ ThinTable table, const StepArguments a) {
  const StepLayer& l = table.find(blockIdx.x);
  const ThinProducts<E, kTiles> products(l);
  const int largest = products.run(static_cast<int>(blockIdx.x - l.first_block));
  raise(counters_of(a, l) + kGradientMagnitude, largest);
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

int64_t thin_entries(const StepLayer& l) {
  const bool written = l.strips <= 1 && l.left.action == Action::kColumnBordered;
  return written ? 0 : l.thin_rows() * padded(l.columns);
}

}  // namespace

bool fits_matrix_products(const StepLayer* layers, int count, const StepKind& kind) {
  // The rows of a panel of G, and those of N, lie within what 32-bit offsets reach.
  const auto reaches = [](int64_t rows, int64_t pitch) {
    return rows * pitch * int64_t{sizeof(float)} <= INT32_MAX;
  };
  const auto fits = [&](const StepLayer& l) {
    if (!l.left.bordered() && !l.right.bordered()) return true;
    return l.gradient_in_vectors && reaches(kMaxSideWidth, padded(std::max(l.columns, l.rows))) &&
           reaches(std::max(panel_rows(l), kThinThreads), l.gradient_pitch);
  };
  return kind.uses_matrices && std::all_of(layers, layers + count, fits);
}

void plan_matrix_products(StepLayer& layer) {
  if (!layer.left.bordered() && !layer.right.bordered()) return;
  const auto dtype = static_cast<Dtype>(layer.gradient_dtype[0]);
  const int64_t fitting = kPanelBytes / (layer.columns * size_of(dtype)) / kThinThreads;
  const int64_t rows =
      std::clamp<int64_t>(fitting * kThinThreads, kThinThreads, panel_limit(dtype));
  layer.strips = static_cast<int32_t>((layer.rows + rows - 1) / rows);
}

void matrix_products(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                     Stream stream) {
  ThinTable table;
  const auto is_wide = [](const SideShape& side) {
    return side.bordered() && side.width > kMatrix;
  };
  const bool wide = std::any_of(layers, layers + count, [&](const StepLayer& l) {
    return is_wide(l.right) || is_wide(l.left);
  });
  dispatch_vectors(kind, [&](auto elements) {
    using E = decltype(elements);
    const auto run = [&](auto most) {
      constexpr int kTiles = decltype(most)::value;
      using Products = ThinProducts<E, kTiles>;
      const int64_t blocks = fill(table, layers, count, [](const StepLayer& l) {
        return int64_t{l.strips} * Pieces(l, Products::S::kOwned, Products::kPart).of_panel();
      });
      launch({"matrix_products", blocks, kThinThreads, stream}, matrix_products_kernel<E, kTiles>,
             table, a);
    };
    // Several planes of a number take the registers of a second tile.
    constexpr int kMost = kStoredPlanes<typename E::Stored> > 1 ? 1 : 2;
    if (wide) {
      run(std::integral_constant<int, kMost>());
    } else {
      run(std::integral_constant<int, 1>());
    }
    const int64_t blocks = fill(table, layers, count, [](const StepLayer& l) {
      return (thin_entries(l) + kStepThreads - 1) / kStepThreads;
    });
    launch({"thin_sums", blocks, kStepThreads, stream}, thin_sums_kernel<E>, table);
  });
}

}  // namespace singd::cuda
