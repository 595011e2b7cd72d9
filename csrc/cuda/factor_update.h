// The stages of update_factors_ on a list of factors, each of them one launch whatever the number
// of factors (with float32 and float64 statistics in one call: two). csrc/cuda/update_factors.cpp
// runs them in the order below.
#pragma once

#include <vector>

#include "../structures/layout.h"
#include "../structures/rounding.h"
#include "arguments.h"

namespace singd::cuda {

// The most layers in a list, such that all their factors fit the arguments of a launch.
constexpr int kMaxLayers = 192;

// One factor. Its arrays, of `size` numbers in the type T of its statistic, start at `arrays` and
// follow each other at the distance array_stride(size):
//
//   V   U K, then -beta m (order 2 only), then the candidate for K
//   H   Pi(K^T U K), then the new Riemannian momentum m
//   G   Pi(K^T K), then E = Expm(-beta m) - I
//   K   a copy in the type T, if K has another one
//
// The partial results of norms_of_factors follow.
struct FactorItem {
  int64_t first_block = 0;  // of the current launch
  void* state;              // K
  void* momentum;           // m_K, or null
  const void* statistic;
  void* arrays;
  double scale;  // of the statistic; C's is also divided by the squared gradient scale
  int64_t size;
  int32_t dim, head, tail;  // `head` holds the block size of block-diagonal factors
  uint16_t id;              // 2 layer + (0 for K, 1 for C), with the layer's place in the list
  uint8_t family : 3, triangle : 2, transposed : 1, copied : 1, wide : 1;
  uint8_t state_dtype, momentum_dtype;  // the state's where there is no momentum

  void set_layout(const Layout& l) {
    dim = static_cast<int32_t>(l.dim);
    head = static_cast<int32_t>(l.family == Family::kBlockDiagonal ? l.block : l.head);
    tail = static_cast<int32_t>(l.tail);
    family = static_cast<uint8_t>(l.family);
    triangle = static_cast<uint8_t>(l.triangle);
    transposed = l.transposed;
  }
  SINGD_HOST_DEVICE Layout layout() const {
    Layout l;
    l.family = static_cast<Family>(family);
    l.dim = dim;
    l.triangle = static_cast<Triangle>(triangle);
    l.block = head;
    l.head = head;
    l.tail = tail;
    l.transposed = transposed;
    return l;
  }
};

constexpr int kFactorArrays = 3;  // and one more where K is copied

// Arrays start at multiples of 128 bytes.
SINGD_HOST_DEVICE constexpr int64_t array_stride(int64_t size) { return (size + 31) / 32 * 32; }

// What a block of norms_of_factors found.
struct PartialNorms {
  double row, column;  // the largest sum of magnitudes of a row, of a column
  double squares;      // of all entries
  double largest;      // magnitude
};

// Blocks of norms_of_factors for one factor, each of which leaves a PartialNorms: for columns by 32
// and rows by 8, or for all coefficients.
SINGD_HOST_DEVICE constexpr int64_t norm_blocks(const Layout& layout) {
  return layout.family == Family::kToeplitz ? 1 : (layout.dim + 31) / 32 + (layout.dim + 7) / 8;
}

// What the stages leave for each other, by FactorItem::id.
struct FactorResult {
  double mean_trace_h, mean_trace_gram, beta;
  int32_t capped, rejected;
};

struct FactorOptions {
  Scalar lr_cov, grad_scale, found_inf;
  double damping, alpha1, step_cap;
  bool kfac_like, normalize_lr_cov, second_order;
  RoundingKey rounding;
  FactorResult* results;  // on the device
  int64_t* outcomes;
  int64_t first_layer;  // of the list, in the call
};

struct FactorList {
  std::vector<FactorItem> single, twice;  // with float32 and with float64 statistics
  std::vector<int64_t*> rejected;         // one counter a layer
  FactorOptions options;
  Stream stream;
};

// In this order. Factors marked `wide` take their products from the library: before
// curvature_and_gram, G holds K^T K and, for block-diagonal ones, H holds K^T U K; before
// factor_candidates, V holds K E and, for order 2, G holds E.
void copy_factors(const FactorList& list);        // K in the type T, where it has another one
void first_products(const FactorList& list);      // V = U K, or long sums of K^T K, into G
void curvature_and_gram(const FactorList& list);  // H and G
void traces_of_factors(const FactorList& list);   // also clears the results
void momenta_of_factors(const FactorList& list);  // m
void norms_of_factors(const FactorList& list);
void step_sizes(const FactorList& list);    // beta
void first_order(const FactorList& list);   // -beta m, in G or, for order 2, in V
void second_order(const FactorList& list);  // E, for order 2
void factor_candidates(const FactorList& list);
void commit_factors(const FactorList& list);

}  // namespace singd::cuda
