// What update_factors_ hands the kernels: a factor, options, and the kernels themselves.
// Torch-free.
#pragma once

#include "typed_arrays.h"

namespace singd::cpu {

// One Kronecker factor of a layer in update_factors_. The type of its statistic, T, is that of all
// that is computed.
struct FactorTask {
  Layout layout;
  int64_t size = 0;  // numbers stored
  ConstArray statistic;
  Array factor, momentum;  // momentum.data is null if alpha1 = 0
  double scale = 1;        // of the statistic, and so of H
  RoundingKey key;
  // Workspace: K in the type of products, H without its scale in T, which ends as the new momentum,
  // and Pi(K^T K), which ends as scratch or as the update of K. A dense factor's statistic is H,
  // but for the weights of Pi, which are missing in Pi(K^T K) too. Blocks and borders keep other
  // numbers of as many places there until they make the momentum.
  void *k = nullptr, *h = nullptr;
  Array gram;
  // Where the new momentum of a factor with ATen's products goes: the place of H, or memory of its
  // own if it is kept as it will be stored.
  Array new_momentum;
  bool is_added_up = false;  // H and Pi(K^T K), with their scales and weights, in the place of H
  double update_scale = 1;   // of the update in `gram`: K + update_scale gram is the next K
  double mean_trace_h = 0, mean_trace_gram = 0;
  double momentum_norm = 0;             // at least the spectral norm of the new momentum
  double beta1 = 0;                     // the step of K
  bool finite = false, capped = false;  // of the candidates

  SINGD_INLINE_EVERYWHERE bool rounds_momentum() const {
    return new_momentum.data != nullptr && new_momentum.type != statistic.type;
  }
};

struct FactorOptions {
  double lr_cov, damping, alpha1, step_cap;
  bool kfac_like, normalize_lr_cov;
  int64_t expm_order;

  // Of H - I and everything else that is new in a momentum.
  double momentum_scale() const { return 0.5 * (normalize_lr_cov ? 1.0 - alpha1 : 1.0); }
};

// What a new momentum adds up to.
struct MomentumSums {
  double rows = 0, squares = 0;  // the largest sum of magnitudes of a row; the sum of all squares
  double largest = 0;            // magnitude, where lr_cov is normalised by it
  double* columns = nullptr;     // sums of magnitudes of the columns, [dim]
  void* row = nullptr;           // scratch for a row of T where the momentum is rounded, [dim]
};

// Rows of the matrix as they lie in a factor's storage, which momenta are made by. What a bordered
// factor has on its diagonal alone is one more row, all of a Toeplitz factor one.
SINGD_INLINE_EVERYWHERE int64_t storage_rows(const Layout& layout) {
  switch (layout.family) {
    case Family::kDense:
    case Family::kBlockDiagonal:
      return layout.dim;
    case Family::kToeplitz:
      return 1;
    default:
      return layout.head + layout.tail + 1;
  }
}

// The numbers of T that the kernels below take as scratch.
inline int64_t factor_scratch(const Layout& layout) {
  const int64_t d = layout.dim, k = layout.block, border = layout.head + layout.tail;
  const int64_t block = 2 * k * padded(k) + 4 * kPadding;
  const int64_t rows = border * (padded(d) + border);
  const int64_t transposed = layout.transposed ? d * padded(border) : 0;
  return block + rows + transposed + 2 * padded(d);
}

struct FactorKernels {
  // Of a diagonal, block-diagonal or bordered factor: K, H, Pi(K^T K) and the mean traces.
  void (*curvature)(FactorTask& task, void* scratch);
  // Then the new momentum and beta1; `partner` is the layer's other factor.
  void (*local_momentum)(FactorTask& task, const FactorTask& partner, const FactorOptions& options,
                         void* scratch);
  // Then the candidates of both: to the state, or only looked at, whether they are finite as they
  // would be stored.
  bool (*local_candidates)(const FactorTask& task, const FactorOptions& options, bool commit,
                           void* scratch);
  // Rows [begin, end) of storage_rows of any factor: the new momentum from H and Pi(K^T K), in the
  // place of H or rounded, and what these rows add up to; all of sums.columns is written.
  void (*momentum)(const FactorTask& task, const FactorTask& partner, const FactorOptions& options,
                   int64_t begin, int64_t end, MomentumSums& sums);
  // beta1 for the momentum whose parts have these sums, and its norm.
  void (*step_size)(FactorTask& task, const MomentumSums* parts, int64_t count,
                    const FactorOptions& options);
  // Slots [begin, end) of an array, times `scale`, in another one.
  void (*copy)(ConstArray from, double scale, int64_t begin, int64_t end, const Array& to);
  // The candidates of slots [begin, end), from the new momentum and the update of K: whether they
  // are finite as they would be stored, and their commit.
  bool (*check)(const FactorTask& task, int64_t begin, int64_t end);
  void (*commit)(const FactorTask& task, int64_t begin, int64_t end);
};

}  // namespace singd::cpu
