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
#include "step_work.cuh"
#include "thin_strip.cuh"

namespace singd::cuda {
namespace {

constexpr int64_t kPanelBytes = int64_t{16} << 20;

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
        panel_rows(strips_of_panel(l) < rows ? strips_of_panel(l) : rows),
        panels(panel_rows == 0 ? 1 : (rows - 1) / panel_rows + 1) {}

  SINGD_HOST_DEVICE static int strips_of_panel(const StepLayer& l) {
    const int64_t bytes = kStrip * l.columns * size_of(static_cast<Dtype>(l.gradient_dtype[0]));
    return bytes < kPanelBytes ? static_cast<int>(kPanelBytes / bytes) : 1;
  }
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
  const int number = static_cast<int>(blockIdx.x - l.first_block);
  const int split = number % l.thin_splits(), begin = split * kThinSplitColumns;
  const Border<T> border{workspace + offsets.right_n, l.right.width, begin,
                         min(begin + kThinSplitColumns, l.columns), pitch};
  const int64_t part = static_cast<int64_t>(split) * l.thin_rows() * l.right.width;
  multiply_rows(source, number / l.thin_splits(), border, workspace + offsets.thin_products + part);
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
    const int64_t strips = l.right.bordered() ? (l.thin_rows() + kStrip - 1) / kStrip : 0;
    return strips * l.thin_splits();
  });
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch({"thin_row_products", blocks, kStepThreads, stream, shared_bytes<T>(layers, count)},
           thin_row_products_kernel<T>, table);
  };
  compute == Dtype::kFloat64 ? run(double{}) : run(float{});
}

}  // namespace singd::cuda
