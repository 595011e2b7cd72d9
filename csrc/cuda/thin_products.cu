// The thin products of layers with a bordered side (preconditioned_update.h), N of width b <= 64:
//
//   thin_products       S = G N_K^T (rows x b), X = N_C G (b x columns), the border rows of G for a
//                       row-bordered C, and max |G|
//   thin_row_products   the same S for the thin rows X and G_B
//
// Bytes: G once from DRAM and, where both sides are bordered, once more from L2, and the thin
// matrices. A block owns a strip of 64 rows of G, or one of 64 columns of a panel: a panel is as
// many rows as L2 keeps, and its column strips follow its row strips. The column strips of a panel
// add to X what the panel before has left there, and wait for it.
//
// A block walks along its strip in chunks of 64, the next one loaded into registers while the
// current one, in shared memory, is multiplied. Its 8 warps share the chunk's depth and the border
// in groups of 16; a lane owns 2 x 16 sums. Partial sums are added in a fixed order.
#include "step.cuh"

namespace singd::cuda {
namespace {

constexpr int kStrip = 64;
constexpr int kDepth = 64;
constexpr int kPitch = kStrip + 1;
constexpr int kGroup = 16;  // border indices of a warp
constexpr int kWarps = kStepThreads / kWarp;
constexpr int64_t kPanelBytes = int64_t{16} << 20;
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

// S in a strip of rows.
template <class Source, class T>
__device__ __forceinline__ int multiply_rows(const Source& source, int strip,
                                             const Border<T>& border, T* products) {
  Sums<T> sums = {};
  const int largest = multiply_strip(source, true, strip, border, sums);
  const int rest = source.rows() - strip * kStrip;
  T* const out = products + static_cast<int64_t>(strip) * kStrip * border.width;
  reduce(sums, border.width, rest, true,
         [&](int position, int r, T sum) { store(out + position * border.width + r, sum); });
  return largest;
}

// The order of a layer's strips: by panels of rows, row strips before column strips.
struct Strips {
  int rows, columns;  // strips of the whole layer
  int panel_rows;     // row strips of a panel, but for the last one
  int panels;

  SINGD_HOST_DEVICE explicit Strips(const StepLayer& l)
      : rows(l.right.bordered() ? (l.rows - 1) / kStrip + 1 : 0),
        columns(l.left.bordered() ? (l.columns - 1) / kStrip + 1 : 0),
        panel_rows(l.panel_strips < rows ? l.panel_strips : rows),
        panels(panel_rows == 0 ? 1 : (rows - 1) / panel_rows + 1) {}

  SINGD_HOST_DEVICE int64_t count() const { return rows + int64_t{panels} * columns; }
};

// The border rows of G in the columns of a strip, as rows `width` ... of the thin rows.
template <class E>
__device__ __forceinline__ void copy_border_rows(const StepLayer& l, int64_t strip,
                                                 typename E::Compute* thin) {
  const int width = l.left.width;
  for (int at = threadIdx.x; at < width * kStrip; at += kStepThreads) {
    const int r = at / kStrip;
    const int64_t j = strip * kStrip + at % kStrip;
    if (j >= l.columns) continue;
    store(thin + (width + r) * padded(l.columns) + j,
          load_gradient<E>(l, l.left.border_index(r, l.rows), static_cast<int>(j)));
  }
}

using ThinTable = Table<StepLayer, kMaxStepLayers>;

// X in a strip of columns, and the border rows of G. Returns the largest magnitude in the strip.
template <class E>
__device__ __forceinline__ int multiply_columns(const StepArguments& a, const StepLayer& l,
                                                const Strips& strips, int panel, int strip) {
  using T = typename E::Compute;
  const StepOffsets offsets(l);
  T* const workspace = static_cast<T*>(l.workspace);
  const int begin = panel * strips.panel_rows * kStrip;
  const int end = panel + 1 < strips.panels ? begin + strips.panel_rows * kStrip : l.rows;
  const Border<T> border{workspace + offsets.left_n, l.left.width, begin, end, padded(l.rows)};
  Sums<T> sums = {};
  const int largest = multiply_strip(GradientRows<E>{l}, false, strip, border, sums);

  T* const thin = workspace + offsets.thin + strip * kStrip;
  int* const finished = counters_of(a, l) + kColumnStripsFinished;
  if (panel > 0) {
    if (threadIdx.x == 0) wait_for(finished, panel * strips.columns);
    __syncthreads();
  }
  reduce(sums, l.left.width, l.columns - strip * kStrip, false, [&](int position, int r, T sum) {
    T* const x = thin + r * padded(l.columns) + position;
    store(x, panel > 0 ? load(x) + sum : sum);
  });
  if (panel == 0 && l.left.action == Action::kRowBordered) {
    copy_border_rows<E>(l, strip, workspace + offsets.thin);
  }
  if (panel + 1 < strips.panels) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(finished, 1);
  }
  return largest;
}

using ThinTable = Table<StepLayer, kMaxStepLayers>;

template <class E>
__global__ void __launch_bounds__(kStepThreads, kResidentBlocks<typename E::Compute>)
    thin_products_kernel(const __grid_constant__ ThinTable table, const StepArguments a,
                         int* ticket) {
  using T = typename E::Compute;
  const int number = take_ticket(ticket);
  const StepLayer& l = table.find(number);
  const Strips strips(l);
  const int inside = number - static_cast<int>(l.first_block);
  const int panel = inside / (strips.panel_rows + strips.columns);
  const int first = panel * strips.panel_rows;
  const int strip = inside - panel * (strips.panel_rows + strips.columns);
  const int rows = min(strips.panel_rows, strips.rows - first);
  int largest = 0;
  if (strip < rows) {
    const StepOffsets offsets(l);
    T* const workspace = static_cast<T*>(l.workspace);
    const Border<T> border{workspace + offsets.right_n, l.right.width, 0, l.columns,
                           padded(l.columns)};
    largest =
        multiply_rows(GradientRows<E>{l}, first + strip, border, workspace + offsets.products);
  } else {
    largest = multiply_columns<E>(a, l, strips, panel, strip - rows);
  }
  raise(counters_of(a, l) + kGradientMagnitude, largest);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, kResidentBlocks<T>)
    thin_row_products_kernel(const __grid_constant__ ThinTable table) {
  const StepLayer& l = table.find(blockIdx.x);
  const StepOffsets offsets(l);
  T* const workspace = static_cast<T*>(l.workspace);
  const int64_t pitch = padded(l.columns);
  const ThinRows<T> source{workspace + offsets.thin, l.thin_rows(), l.columns};
  const Border<T> border{workspace + offsets.right_n, l.right.width, 0, l.columns, pitch};
  multiply_rows(source, static_cast<int>(blockIdx.x - l.first_block), border,
                workspace + offsets.thin_products);
}

template <class T>
size_t shared_bytes(const StepLayer* layers, int count) {
  int64_t elements = 0;
  for (int n = 0; n < count; ++n) {
    const StepLayer& l = layers[n];
    if (l.right.bordered()) elements = std::max(elements, shared_elements<T>(l.right.width));
    if (l.left.bordered()) elements = std::max(elements, shared_elements<T>(l.left.width));
  }
  return static_cast<size_t>(elements) * sizeof(T);
}

}  // namespace

void plan_thin_products(StepLayer& layer) {
  const int64_t strip_bytes =
      kStrip * layer.columns * size_of(static_cast<Dtype>(layer.gradient_dtype[0]));
  layer.panel_strips = static_cast<int32_t>(std::max<int64_t>(1, kPanelBytes / strip_bytes));
}

void thin_products(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                   int* ticket, Stream stream) {
  ThinTable table;
  const int64_t blocks =
      fill(table, layers, count, [](const StepLayer& l) { return Strips(l).count(); });
  dispatch(kind, [&](auto elements) {
    using E = decltype(elements);
    launch({"thin_products", blocks, kStepThreads, stream,
            shared_bytes<typename E::Compute>(layers, count)},
           thin_products_kernel<E>, table, a, ticket);
  });
}

void thin_row_products(StepLayer* layers, int count, Dtype compute, Stream stream) {
  ThinTable table;
  const int64_t blocks = fill(table, layers, count, [](const StepLayer& l) {
    return l.right.bordered() ? static_cast<int64_t>(l.thin_rows() + kStrip - 1) / kStrip : 0;
  });
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch({"thin_row_products", blocks, kStepThreads, stream, shared_bytes<T>(layers, count)},
           thin_row_products_kernel<T>, table);
  };
  compute == Dtype::kFloat64 ? run(double{}) : run(float{});
}

}  // namespace singd::cuda
