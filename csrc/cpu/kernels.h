// The vectorised kernels of the CPU: plain functions over raw pointers, compiled once per
// instruction set (simd_*.cpp) and chosen at run time. Torch-free.
#pragma once

#include "factor_task.h"
#include "typed_arrays.h"

namespace singd::cpu {

// P = F F^T of a factor whose products are local: what a step multiplies gradients by.
//
//   kIdentity      nothing
//   kDiagonal      diagonal[dim]
//   kBlocks        blocks of width x padded(width), one after the other
//   kRowBorder     an arrowhead: P[B, :] in `wide` [border, spaced(dim)], its transpose in `thin`
//                  [dim, padded(border)], P[i, i] in `diagonal` [padded(dim)], which is 0 for i in
//                  B
//   kColumnBorder  thin wide + diag(diagonal): `thin` is F[:, B], `wide` its transpose
//
// Tiles (simd/tiles.h) take matrices as planes of bfloat16 numbers: these lie in the place of the
// float32 numbers, and dimensions are whole depths of tiles.
//
// Pairs (simd/pairs.h) are an arrowhead's on the right, of the factor F = R = [E; D] itself, where
// that has bfloat16 numbers, so that none is rounded: `wide` is E and `thin` its transpose, in the
// place of the float32 numbers, `diagonal` D, and `outer` [padded(dim)] what columns are multiplied
// with at last: D, and 1 in B.
enum class LocalKind { kIdentity, kDiagonal, kBlocks, kRowBorder, kColumnBorder };

// A matrix of numbers, or of planes or pairs: of P on the left of a product, or on the right.
enum class Form { kNumbers, kLeftPlanes, kRightPlanes, kRightPairs };

// Numbers that a tile has along the terms of a product, and a multiple of it.
inline constexpr int64_t kTileDepth = 32;
SINGD_HOST_DEVICE inline constexpr int64_t whole_depths(int64_t n) {
  return (n + kTileDepth - 1) / kTileDepth * kTileDepth;
}
// Whether blocks or borders so wide fill tiles well enough to be faster there.
SINGD_HOST_DEVICE inline constexpr bool fills_tiles(int64_t width) {
  return 4 * width >= 3 * whole_depths(width);
}

template <class T>
struct LocalProduct {
  LocalKind kind = LocalKind::kIdentity;
  Form form = Form::kNumbers;
  Layout layout;
  T *diagonal = nullptr, *blocks = nullptr, *thin = nullptr, *wide = nullptr;
  T* outer = nullptr;
  int64_t taps = 1;  // of a diagonal on the right, if its columns are in channels-last order
  double norm = 1;   // bounds every sum of |terms| that a multiplication by P takes, over max |x|

  SINGD_INLINE_EVERYWHERE int64_t border() const { return layout.head + layout.tail; }
  // The side of a block, or the width of a border.
  SINGD_INLINE_EVERYWHERE int64_t width() const {
    return kind == LocalKind::kBlocks ? layout.block : border();
  }
  // Whether its products are of tiles, and not of single rows.
  SINGD_INLINE_EVERYWHERE bool has_tiles() const { return width() > 1 && !is_pointwise(); }
  SINGD_INLINE_EVERYWHERE bool has_planes() const {
    return form == Form::kLeftPlanes || form == Form::kRightPlanes;
  }
  SINGD_INLINE_EVERYWHERE bool has_pairs() const { return form == Form::kRightPairs; }
  // Rows and columns in memory of a matrix of P that has n of them.
  SINGD_INLINE_EVERYWHERE int64_t rows_of(int64_t n) const {
    return has_planes() ? whole_depths(n) : n;
  }
  SINGD_INLINE_EVERYWHERE int64_t stride_of(int64_t n) const {
    return has_planes() ? whole_depths(n) : padded(n);
  }
  SINGD_INLINE_EVERYWHERE int64_t wide_stride() const {
    return has_planes() ? whole_depths(layout.dim) : spaced(layout.dim);
  }
  // Rows behind the last one that squares on tiles may read of P on the left, and write.
  SINGD_INLINE_EVERYWHERE int64_t overshoot() const { return form == Form::kLeftPlanes ? 15 : 0; }
  SINGD_INLINE_EVERYWHERE bool is_pointwise() const {
    return kind == LocalKind::kIdentity || kind == LocalKind::kDiagonal;
  }
  SINGD_INLINE_EVERYWHERE bool has_border() const {
    return kind == LocalKind::kRowBorder || kind == LocalKind::kColumnBorder;
  }
  // Rows [first, last) of P x that take a part of P[:, B]: of an arrowhead those outside the
  // border.
  SINGD_INLINE_EVERYWHERE int64_t first_mixed() const {
    return kind == LocalKind::kRowBorder ? layout.head : 0;
  }
  SINGD_INLINE_EVERYWHERE int64_t last_mixed() const {
    return kind == LocalKind::kRowBorder ? layout.dim - layout.tail : layout.dim;
  }
};

// The largest kernel of a convolution whose rows a step takes in another order than W's.
inline constexpr int64_t kMostTaps = 512;

// Rows [row_begin, row_begin + height) and columns [begin, begin + width) of a layer's matrix W: a
// parameter with its momentum and gradient. Parts have all rows, or all columns of W.
struct StepPart {
  Array weight, momentum;  // contiguous; momentum.data is null if alpha2 = 0
  ConstArray gradient;     // rows `gradient_stride` apart
  int64_t row_begin = 0, height = 0, begin = 0, width = 0, gradient_stride = 0;
  int64_t taps = 1;   // of a convolution's kernel, if its rows are not in the order of W:
  int64_t apart = 0;  // from channel to channel of a transposed one, whose rows are `taps` apart; 0
                      // in channels-last order
  RoundingKey key;

  SINGD_INLINE_EVERYWHERE bool is_line() const { return height == 1 || width == 1; }
};

struct StepOptions {
  double lr, momentum, weight_decay, unscale;
  bool stream = false;  // weights are stored past the caches
  bool ask = false;     // W and M are asked for before they are written
};

// One layer of a step: M <- alpha2 M + C C^T G K K^T + gamma W and W <- W - beta2 M. A weight that
// lies in memory as W^T is stepped so, as M^T <- alpha2 M^T + K K^T G^T C C^T + gamma W^T: it is
// turned, with the bias as its last row.
template <class T>
struct StepLayer {
  StepPart parts[2];
  int num_parts = 0;
  int64_t rows = 0, columns = 0;
  bool is_turned = false;
  LocalProduct<T> left, right;  // C C^T and K K^T, or these turned
  // With a border on the left: the rows P[B, :] G, and for an arrowhead the rows G[B, :] too.
  // [border, spaced(columns)] each; with tiles there is room for whole ones.
  T *border_products = nullptr, *border_rows = nullptr;
  StepOptions options;

  SINGD_INLINE_EVERYWHERE bool has_taps() const { return parts[0].taps > 1; }
};

// A rectangle of a layer's matrix. With blocks on a side it holds whole blocks, with a border on
// the right whole rows.
struct Panel {
  int64_t row_begin, row_end, column_begin, column_end;

  int64_t stride() const { return spaced(column_end - column_begin); }
  int64_t scratch() const { return (row_end - row_begin) * stride(); }
};

// Scratch of a step: the panel, and behind it two of its pieces, or what a border on the right
// takes.
inline constexpr int64_t kPieceColumns = 256;
// Columns of a panel that are brought into pairs at a time, which fit the first cache.
inline constexpr int64_t kPairColumns = 256;
template <class T>
SINGD_INLINE_EVERYWHERE bool has_blocks(const StepLayer<T>& layer) {
  return layer.left.kind == LocalKind::kBlocks || layer.right.kind == LocalKind::kBlocks;
}
template <class T>
SINGD_INLINE_EVERYWHERE int64_t scratch_rows(const StepLayer<T>& layer, const Panel& panel) {
  return panel.row_end - panel.row_begin + layer.left.overshoot();
}
template <class T>
SINGD_INLINE_EVERYWHERE int64_t panel_scratch(const StepLayer<T>& layer, const Panel& panel) {
  return scratch_rows(layer, panel) * panel.stride();
}
template <class T>
SINGD_INLINE_EVERYWHERE int64_t piece_columns(const StepLayer<T>& layer) {
  const int64_t unit = layer.right.kind == LocalKind::kBlocks ? layer.right.layout.block : kPadding;
  return unit >= kPieceColumns ? unit : kPieceColumns / unit * unit;
}
template <class T>
SINGD_INLINE_EVERYWHERE int64_t piece_scratch(const StepLayer<T>& layer, const Panel& panel) {
  return scratch_rows(layer, panel) * spaced(piece_columns(layer));
}
template <class T>
SINGD_INLINE_EVERYWHERE int64_t step_scratch(const StepLayer<T>& layer, const Panel& panel) {
  int64_t more = has_blocks(layer) ? 2 * piece_scratch(layer, panel) : 0;
  if (layer.right.has_border()) {
    const int64_t pairs = layer.right.has_pairs() ? kPairColumns / 2 : 0;
    const int64_t border = scratch_rows(layer, panel) * (2 * padded(layer.right.border()) + pairs);
    more = border > more ? border : more;
  }
  return panel_scratch(layer, panel) + more;
}

template <class T>
struct StepKernels {
  // Fills a LocalProduct, whose arrays are allocated, from the factor's storage of `size` numbers;
  // scratch: size + stride_of(width)^2 or, with a border, a row of wide_stride() if that is more.
  void (*prepare)(LocalProduct<T>& product, ConstArray storage, int64_t size, T* scratch);
  // Rows of unscale G, `stride` apart.
  void (*load)(const StepLayer<T>& layer, const Panel& panel, T* to, int64_t stride);
  // max |unscale G| over the rows of a panel; infinite if not finite.
  double (*largest)(const StepLayer<T>& layer, const Panel& panel);
  // P[B, :] G of some rows [border, spaced(columns)], their part of border_rows, and max |unscale
  // G|; scratch: kThinRows * spaced(kThinColumns).
  double (*thin)(const StepLayer<T>& layer, const Panel& panel, T* products, T* scratch);
  // Adds such products to border_products.
  void (*add_products)(const StepLayer<T>& layer, const T* products);
  // When all are there: brings the rows that a border on the left spreads over the others into the
  // form in which `step` takes them.
  void (*finish_border)(const StepLayer<T>& layer);
  // The step of a panel; with `check_only`, only whether all that it would store is finite.
  // scratch: step_scratch.
  bool (*step)(const StepLayer<T>& layer, const Panel& panel, bool check_only, T* scratch);
};
inline constexpr int64_t kThinRows = 64, kThinColumns = 128;  // of scratch in `thin`

// The rows of X or g of one call: X[batch, shared, features] of any strides, or with `reduce` one
// row a sample, added up over `shared`. With a bias the column behind the features holds `one`.
struct RowsView {
  ConstArray array;
  int64_t batch_stride, shared_stride, feature_stride;
  int64_t count, shared, features;
  bool reduce;
  double scale, one;
};

// Parts of X^T X of a rectangle of X, added to sums: what makes a statistic once the sums of all
// rectangles are added up. With blocks it holds whole blocks.
template <class T>
struct GramKernels {
  // Diagonal blocks, of `block` rows of padded(block) numbers each, from the diagonal on; scratch:
  // kChunkDepth rows of kChunkColumns + block + 2 kPadding.
  void (*blocks)(const RowsView& rows, const Layout& layout, const Panel& part, T* sums,
                 T* scratch);
  // E^T X for the border columns E of X, or for E [count, padded(border)] where given, and column
  // squares: border + 1 rows of padded(dim) numbers; scratch: kChunkDepth rows of kChunkColumns +
  // padded(border) + 2 kPadding, or with a border of one row 2 dim.
  void (*border)(const RowsView& rows, const Layout& layout, const T* e, const Panel& part, T* sums,
                 T* scratch);
};

// Rows [begin, end) of X^T X, of padded(dim - begin) numbers each, those from the diagonal on;
// scratch: kChunkDepth rows of spaced(dim - begin).
using GramRows = void(const RowsView& rows, int64_t dim, int64_t begin, int64_t end, float* sums,
                      float* scratch);

// Rows and columns that are brought to scratch at a time, which fits the second cache: in long
// pieces of rows, as memory is fastest. A block that is wider comes whole.
inline constexpr int64_t kChunkDepth = 64, kChunkColumns = 384;

template <class T>
struct StatisticKernels {
  // Rows [first, first + count), `stride` apart with zeros between.
  void (*load)(const RowsView& rows, int64_t first, int64_t count, int64_t begin, int64_t end,
               T* to, int64_t stride);
  // Column squares, added to sums [padded(dim)]; scratch: as of a border, or the part's columns.
  void (*diagonal)(const RowsView& rows, const Panel& part, T* sums, T* scratch);
  GramKernels<T> gram;
  // Rows of S = X E^T, E [border, dim], with its transpose V [dim, padded(border)]; scratch:
  // 2 * kProductRows * padded(dim).
  void (*border_rows)(const RowsView& rows, const Layout& layout, const T* e, const T* v,
                      int64_t first, int64_t count, T* s, T* scratch);
  // The transpose of `from` [rows, columns].
  void (*turn)(const T* from, int64_t rows, int64_t columns, int64_t from_stride, T* to,
               int64_t to_stride);
  // The same, padded with zeros.
  void (*transpose)(const T* from, int64_t rows, int64_t columns, int64_t from_stride, T* to,
                    int64_t to_stride);
  void (*add)(const T* from, int64_t count, T* to);
  // From sums to the statistic, which they are added to: of the blocks in columns [begin, end), of
  // rows [begin, end) of a row border, and of a column border, with scratch: border *
  // padded(border).
  void (*finish_blocks)(const Layout& layout, const T* sums, int64_t begin, int64_t end,
                        T* statistic);
  void (*finish_row_border)(const Layout& layout, const T* sums, int64_t begin, int64_t end,
                            T* statistic);
  void (*finish_column_border)(const Layout& layout, const T* factor, const T* v, const T* sums,
                               T* statistic, T* scratch);
};
inline constexpr int64_t kProductRows = 12;

struct Kernels {
  const char* name;
  StatisticKernels<float> statistic_float;
  StatisticKernels<double> statistic_double;
  StepKernels<float> step_float;
  StepKernels<double> step_double;
  FactorKernels factors_float, factors_double;
  // Rows [begin, end) of a square matrix below its diagonal, from above it. Elements of 2, 4 or 8
  // bytes.
  void (*mirror)(void* square, int64_t element_size, int64_t dim, int64_t begin, int64_t end);

  template <class T>
  const StatisticKernels<T>& statistic() const {
    if constexpr (sizeof(T) == sizeof(double)) {
      return statistic_double;
    } else {
      return statistic_float;
    }
  }
  template <class T>
  const StepKernels<T>& step() const {
    if constexpr (sizeof(T) == sizeof(double)) {
      return step_double;
    } else {
      return step_float;
    }
  }
  const FactorKernels& factors(Scalar type) const {
    return type == Scalar::kFloat64 ? factors_double : factors_float;
  }
};

namespace plain {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
// Statistics of bfloat16 rows whose features lie side by side, and steps.
namespace avx512_bfloat16 {
extern const GramKernels<float> gram_kernels;
extern const StepKernels<float> step_kernels;
GramRows rows;
}  // namespace avx512_bfloat16
namespace amx {
extern const GramKernels<float> gram_kernels;
extern const StepKernels<float> step_kernels;
GramRows rows;
}  // namespace amx
#endif

// The kernels for this processor; ATEN_CPU_CAPABILITY (avx512, avx2, default) chooses lesser ones,
// as it does for torch.
const Kernels& kernels();

// Kernels that multiply rows of bfloat16 numbers as they are, with sums in float32: for rows whose
// features lie side by side and are not added up. Null if the processor has no such products, or if
// they are slow for blocks or borders of this width.
const GramKernels<float>* bfloat16_gram(int64_t width);

// The Gram matrix of bfloat16 rows as above, of any width; null if the processor has no such
// products, or slow ones.
GramRows* bfloat16_gram_rows();

// Kernels that multiply on tiles, for layers whose matrices of P are planes; null if the processor
// has no tiles.
const StepKernels<float>* tile_step();

// Kernels that round to bfloat16 by one instruction, for layers stored in any type; null if the
// processor has none.
const StepKernels<float>* bfloat16_step();

// Whether products of pairs of bfloat16 numbers take half as long as those of float32 numbers.
bool pairs_are_faster();

// Whether large float32 products are faster in oneDNN than as at::mm, which is MKL's.
bool onednn_is_faster();

// Whether a step that is as fast as memory gains by asking for what follows.
bool asking_pays();

// How many threads an operator is run by now.
int threads();

}  // namespace singd::cpu
