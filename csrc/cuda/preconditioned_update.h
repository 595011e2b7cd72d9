// What the launcher of preconditioned_update_ hands to its kernels.
//
// A layer's step is P = A_C G A_K with A = K K^T, then M <- alpha2 M + P + gamma W, W <- W - lr M.
// A side (A_K acts on the right, A_C on the left) is described by two arrays that a first launch
// derives from the factor, delta [dim] and N [width, dim]:
//
//   kDiagonal         y = delta x
//   kBlocks           y[j] = sum_t N[t, j] x[start(j) + t]            N: the blocks of A side by
//   side kRowBordered      y[I] = delta x[I] + N[:, I]^T x[B],  y[B] = N x   N = A[B, :]
//   kColumnBordered   y = delta x + N^T (N x)              N: the stored border; delta is 0 on B
//
// So with S = G N_K^T (rows x border) and X = N_C G (border x columns), G A_K and then A_C (G A_K)
// follow tile by tile. The rows of X, and for a row-bordered C the border rows of G, go through A_K
// like further rows of G.
#pragma once

#include "../structures/rounding.h"
#include "arguments.h"
#include "dtype.h"

namespace singd::cuda {

// The widest block and border for which a side is not materialised.
constexpr int64_t kMaxSideWidth = 64;

constexpr int kThinSplitColumns = 512;

// What a block prepares before its first tile is worth several.
constexpr int kMatrixTilesAtOnce = 4;

enum class Action : int8_t { kDiagonal, kBlocks, kRowBordered, kColumnBordered };

struct SideShape {
  Action action = Action::kDiagonal;
  int16_t width = 0;  // of a block or of the border
  int16_t head = 0;   // the border is the first `head` and the last `width - head` indices

  SINGD_HOST_DEVICE bool bordered() const {
    return action == Action::kRowBordered || action == Action::kColumnBordered;
  }
  // Where row r of the border lies in a factor of this dimension, and the other way around.
  SINGD_HOST_DEVICE int64_t border_index(int64_t r, int64_t dim) const {
    return r < head ? r : r + dim - width;
  }
  SINGD_HOST_DEVICE bool is_border(int64_t i, int64_t dim) const {
    return i < head || i >= dim - width + head;
  }
  SINGD_HOST_DEVICE int64_t border_row(int64_t i, int64_t dim) const {
    return i < head ? i : i - dim + width;
  }
};

// One layer; W = [weight, bias] is rows x columns.
struct StepLayer {
  int64_t first_block = 0;
  void *weight = nullptr, *bias = nullptr;
  void *momentum_weight = nullptr, *momentum_bias = nullptr;  // null for alpha2 = 0
  const void *gradient = nullptr, *gradient_bias = nullptr;
  int64_t* skipped = nullptr;
  void* workspace = nullptr;  // the arrays of StepOffsets
  int32_t rows = 0, columns = 0;
  int32_t gradient_pitch = 0, gradient_bias_pitch = 0;  // from row to row, in elements
  int32_t index = 0;                                    // in the lists of the call
  int32_t slot = 0;                                     // of its counters
  int32_t first_tiles = 0;  // pieces of work that come before those that write
  int32_t strips = 0;       // panels of rows, in matrix_products
  int16_t tile_rows = 0, tile_columns = 0;
  SideShape right, left;
  // Dtypes, in the order weight, bias.
  int8_t parameter_dtype[2] = {}, momentum_dtype[2] = {}, gradient_dtype[2] = {};
  bool gradient_in_vectors = false;  // its rows are aligned like those of the weight
  int8_t planes = 0;                 // of matrix_update's operands; 0 elsewhere

  SINGD_HOST_DEVICE int weight_columns() const { return columns - (bias != nullptr ? 1 : 0); }
  // Thin rows that go through A_K: X, and the border rows of G.
  SINGD_HOST_DEVICE int thin_rows() const {
    if (left.action == Action::kRowBordered) return 2 * left.width;
    return left.action == Action::kColumnBordered ? left.width : 0;
  }
  // thin_row_products has few rows: its blocks share the columns.
  SINGD_HOST_DEVICE int thin_splits() const {
    return (columns + kThinSplitColumns - 1) / kThinSplitColumns;
  }
  SINGD_HOST_DEVICE int column_tiles() const { return (columns + tile_columns - 1) / tile_columns; }
  // Of matrix_update: tiles are 32 x 256 instead of 64 x 128.
  SINGD_HOST_DEVICE bool wide_tiles() const { return tile_columns > 128; }
  SINGD_HOST_DEVICE int row_tiles() const { return (rows + tile_rows - 1) / tile_rows; }
  SINGD_HOST_DEVICE int64_t tiles() const { return int64_t{row_tiles()} * column_tiles(); }
  // Tiles that a block of the update launch writes, and blocks that write.
  SINGD_HOST_DEVICE int tiles_at_once() const { return planes == 0 ? 1 : kMatrixTilesAtOnce; }
  SINGD_HOST_DEVICE int64_t updates() const {
    return (tiles() + tiles_at_once() - 1) / tiles_at_once();
  }
};

// Row lengths in the workspace keep rows aligned.
SINGD_HOST_DEVICE inline int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// Elements of the compute type in a layer's workspace, one array after the other; rows of length d
// take padded(d).
struct StepOffsets {
  int64_t right_delta = 0, right_n, left_delta, left_n;
  int64_t products;       // S = G N_K^T: rows x right.width
  int64_t thin;           // X, and the border rows of G: thin_rows x columns
  int64_t thin_products;  // [X; G_B] N_K^T: thin_splits x thin_rows x right.width, to be added
  int64_t thin_result;    // [X; G_B] A_K
  int64_t partial;        // N_C G by panels of rows, where there are several
  int64_t size;

  SINGD_HOST_DEVICE explicit StepOffsets(const StepLayer& l) {
    const int64_t columns = padded(l.columns), rows = padded(l.rows);
    const int64_t right_border = l.right.bordered() ? l.right.width : 0;
    right_n = columns;
    left_delta = right_n + l.right.width * columns;
    left_n = left_delta + rows;
    products = left_n + l.left.width * rows;
    thin = products + padded(l.rows * right_border);
    thin_products = thin + l.thin_rows() * columns;
    thin_result = thin_products + padded(l.thin_splits() * l.thin_rows() * right_border);
    partial = thin_result + l.thin_rows() * columns;
    const bool has_partial = l.left.bordered() && l.strips > 1;
    size = partial + (has_partial ? l.strips * l.left.width * columns : 0);
  }
};

// One factor of a layer, for the launch that derives delta and N, which lie side by side.
struct StepFactor {
  int64_t first_block = 0;
  const void* factor = nullptr;  // null: A is the identity
  void* delta = nullptr;
  int32_t dim = 0;
  int32_t slot = 0;  // of the layer's counters
  SideShape shape;
  int8_t dtype = 0;
  bool is_left = false;
};

// A layer's counters, all 0 at first. Magnitudes are kept as bits, whose order is theirs.
constexpr int kCounters = 8;
enum Counter {
  kGradientMagnitude,  // max |G|
  kFirstTilesFinished,
  kColumnStripsFinished,
  kRightRowSum,  // largest row sum of |K|
  kRightColumnSum,
  kLeftRowSum,
  kLeftColumnSum,
  kUpdatesFinished
};

struct StepArguments {
  int* counters = nullptr;  // kCounters for each slot
  int64_t* outcomes = nullptr;
  Scalar lr, grad_scale, found_inf;
  double momentum = 0, weight_decay = 0;
  RoundingKey key;
};

// What a launch has in common: layers whose parameters, momenta and gradients have one dtype
// `element` with aligned rows move 16 bytes at a time, others go element by element.
struct StepKind {
  bool in_vectors = false;
  Dtype element = Dtype::kFloat32;  // if in_vectors
  Dtype compute = Dtype::kFloat32;  // float32 or float64
  bool uses_matrices = false;       // the update's products are those of the tensor cores
  // Of such layers: K has blocks, C has, and tiles are wide.
  bool right_blocks = false, left_blocks = false, wide_tiles = false;
};

constexpr int kMaxStepLayers = 239;
constexpr int kMaxStepFactors = 2 * kMaxStepLayers;

// Each takes at most that many items, and sets their first blocks. A ticket is a counter of the
// launch's own, 0 at first.
// delta, N and the row and column sums of the factors.
void clear_counters(int* counters, int64_t count, Stream stream);
void prepare_step(StepFactor* factors, int count, Dtype compute, int* counters, Stream stream);
// S, X, G_B and max |G| of layers with a bordered side.
void thin_products(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                   int* ticket, Stream stream);
// The same on the tensor cores, for layers of a kind that uses them whose gradients move in
// vectors, too.
bool fits_matrix_products(const StepLayer* layers, int count, const StepKind& kind);
void matrix_products(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                     Stream stream);
// [X; G_B] N_K^T of layers with two bordered sides.
void thin_row_products(StepLayer* layers, int count, Dtype compute, Stream stream);
// The update of layers with two diagonal sides.
void stream_update(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                   int* ticket, Stream stream);
// [X; G_B] A_K of layers with a bordered C.
void thin_results(StepLayer* layers, int count, Dtype compute, Stream stream);
// The update of layers with another side, on the tensor cores: float32 and 16-bit ones in vectors,
// whose tiles end where sectors do.
bool fits_matrix_update(const StepLayer& layer, const StepKind& kind);
void matrix_update(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                   int* ticket, Stream stream);
// The update of all other layers.
void tiled_update(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                  int* ticket, Stream stream);

// Panels, and tile shapes and with them the number of first tiles.
void plan_matrix_products(StepLayer& layer);
void plan_stream_update(StepLayer& layer);
void plan_matrix_update(StepLayer& layer, const StepKind& kind);
void plan_tiled_update(StepLayer& layer, const StepKind& kind);

}  // namespace singd::cuda
