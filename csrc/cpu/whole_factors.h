// update_factors_ for a layer with a factor whose products are ATen's: dense, triangular, Toeplitz,
// or with wide blocks or borders. One layer after the other in the same memory, each in all
// threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../structures/registry.h"
#include "arena.h"
#include "local_factors.h"
#include "math.h"
#include "thread_scratch.h"

namespace singd::cpu {

// Width of blocks and borders up to which the kernels' own products are as fast as ATen's.
inline constexpr int64_t kLocalWidth = 256;

inline bool has_local_products(const Layout& layout) {
  switch (layout.family) {
    case Family::kDiagonal:
      return true;
    case Family::kBlockDiagonal:
      return layout.block <= kLocalWidth;
    case Family::kBordered:
      return layout.head + layout.tail <= kLocalWidth;
    default:
      return false;
  }
}

class WholeFactors {
 public:
  WholeFactors(at::Tensor& workspace, const FactorOptions& options)
      : workspace_(workspace), options_(options) {}

  void run(FactorTask& k, FactorTask& c) {
    Arena::run(workspace_, [&](Arena& arena) {
      int64_t scratch = 0;
      for (FactorTask* task : {&k, &c}) {
        has_local_products(task->layout) ? allocate_task(*task, arena) : allocate(*task, arena);
        scratch = std::max(scratch, scratch_bytes(*task));
      }
      scratch_ = arena.take<std::byte>(scratch);
    });
    for (FactorTask* task : {&k, &c}) curvature(*task);
    candidate(k, c);
    candidate(c, k);
    if (k.finite && c.finite) {
      commit(k);
      commit(c);
    }
  }

 private:
  // Parts of the rows at most; each adds up its columns by itself.
  static constexpr int64_t kMostParts = 64;

  static const FactorKernels& kernels_of(const FactorTask& task) {
    return kernels().factors(task.statistic.type);
  }

  // A dense factor that is stored in bfloat16 is multiplied in it, with sums in float32, at a
  // quarter of the time. What is rounded, K^T K and the small K E that is added to K, then still is
  // finer than K's own last place.
  static Scalar product_type(const FactorTask& task) {
    const bool in_bfloat16 = task.layout.family == Family::kDense &&
                             task.factor.type == Scalar::kBFloat16 &&
                             task.statistic.type == Scalar::kFloat32;
    return in_bfloat16 ? Scalar::kBFloat16 : task.statistic.type;
  }

  // What the new momentum is kept in: the type of products if it is stored in that, and then as it
  // will be stored, which is less to read and write.
  static Scalar momentum_type(const FactorTask& task) {
    const Scalar type = product_type(task);
    const bool as_stored = task.momentum.data == nullptr || task.momentum.type == type;
    return as_stored ? type : task.statistic.type;
  }

  // f(family, T{}, P{}) with the types of a task's statistic and of its products.
  template <class Function>
  static void dispatch(const FactorTask& task, Function f) {
    if (product_type(task) == Scalar::kBFloat16) {
      return f(Dense(task.layout), float{}, at::BFloat16{});
    }
    dispatch_compute(
        task.statistic.type == Scalar::kFloat64 ? at::kDouble : at::kFloat,
        [&](auto zero) { visit(task.layout, [&](const auto& family) { f(family, zero, zero); }); });
  }

  // K is where it is stored, if that is the type of its products.
  static void allocate(FactorTask& task, Arena& arena) {
    const Scalar type = product_type(task);
    const auto take = [&](Scalar of) -> void* {
      return arena.take<std::byte>(task.size * size_of(of));
    };
    task.k = task.factor.type == type ? task.factor.data : take(type);
    const Scalar momentum = momentum_type(task);
    task.new_momentum = {take(momentum), momentum};
    if (momentum == task.statistic.type) task.h = task.new_momentum.data;
    task.gram = {take(type), type};
  }

  static int64_t parts_of(const FactorTask& task) {
    const int64_t most = std::min(kMostParts, storage_rows(task.layout));
    return std::clamp<int64_t>(task.size / AtenMath::kGrain, 1, most);
  }

  // Whether K's update is the product with the momentum, whose scale is left to the end.
  bool multiplies_momentum(const FactorTask& task) const {
    return options_.expm_order == 1 && task.new_momentum.type == task.gram.type;
  }

  // For column sums, then for the exponential.
  int64_t scratch_bytes(const FactorTask& task) const {
    if (has_local_products(task.layout)) {
      return factor_scratch(task.layout) * size_of(task.statistic.type);
    }
    const int64_t sums = parts_of(task) * task.layout.dim * int64_t{sizeof(double)};
    const int64_t exponential = multiplies_momentum(task) ? 0 : 2 * size_of(task.gram.type);
    return std::max(sums, task.size * exponential);
  }

  void curvature(FactorTask& task) {
    if (has_local_products(task.layout)) return kernels_of(task).curvature(task, scratch_);
    if (task.k != task.factor.data) {
      copy(task, {task.factor.data, task.factor.type}, 1, {task.k, task.gram.type});
    }
    dispatch(task, [&](const auto& family, auto t, auto p) {
      whole_curvature<decltype(t), decltype(p)>(family, task);
    });
  }

  template <class T, class P>
  static void whole_curvature(const Dense& family, FactorTask& task) {
    const int64_t d = task.layout.dim;
    const MatrixView<const P> k{static_cast<const P*>(task.k), d};
    P* gram = static_cast<P*>(task.gram.data);
    AtenMath::multiply_symmetric(d, d, k, k, MatrixView<P>{gram, d}, false);
    set_traces(family, task, static_cast<const T*>(task.statistic.data), gram);
  }

  template <class T, class P, class FamilyT>
  static void whole_curvature(const FamilyT& family, FactorTask& task) {
    const P* k = static_cast<const P*>(task.k);
    T *h = static_cast<T*>(task.h), *gram = static_cast<T*>(task.gram.data);
    family.template conjugate<AtenMath, T>(k, static_cast<const T*>(task.statistic.data), h);
    family.template gram<AtenMath, T>(k, gram);
    set_traces(family, task, h, gram);
  }

  template <class FamilyT, class T, class P>
  static void set_traces(const FamilyT& family, FactorTask& task, const T* h, const P* gram) {
    const double d = static_cast<double>(task.layout.dim);
    task.mean_trace_h = family.trace(h) * task.scale / d;
    task.mean_trace_gram = family.trace(gram) / d;
  }

  // As in simd/candidates.h.
  void candidate(FactorTask& task, const FactorTask& partner) {
    if (has_local_products(task.layout)) {
      kernels_of(task).local_momentum(task, partner, options_, scratch_);
      task.finite = is_surely_finite(task) || local_candidates(task, false);
      return;
    }
    momentum(task, partner);
    dispatch(task, [&](const auto& family, auto, auto p) { update<decltype(p)>(family, task); });
    task.finite = is_surely_finite(task) || has_finite_candidates(task);
  }

  bool local_candidates(const FactorTask& task, bool commit) const {
    return kernels_of(task).local_candidates(task, options_, commit, scratch_);
  }

  static bool has_finite_candidates(const FactorTask& task) {
    std::atomic<bool> finite{true};
    parallel(task, [&](int64_t begin, int64_t end) {
      if (!kernels_of(task).check(task, begin, end)) finite = false;
    });
    return finite;
  }

  // The new momentum and beta1. The parts do not depend on the threads, so sums do not either.
  void momentum(FactorTask& task, const FactorTask& partner) {
    const int64_t parts = parts_of(task), rows = storage_rows(task.layout), d = task.layout.dim;
    std::vector<MomentumSums> sums(static_cast<size_t>(parts));
    AtenMath::parallel_for(parts, task.size / parts, [&](int64_t begin, int64_t end) {
      void* row = task.rounds_momentum() ? thread_scratch<float>(d) : nullptr;
      for (int64_t i = begin; i < end; ++i) {
        MomentumSums& part = sums[static_cast<size_t>(i)];
        part.columns = reinterpret_cast<double*>(scratch_) + i * d;
        part.row = row;
        kernels_of(task).momentum(task, partner, options_, rows * i / parts, rows * (i + 1) / parts,
                                  part);
      }
    });
    kernels_of(task).step_size(task, sums.data(), parts, options_);
  }

  // K E for E = Expm(-beta m) - I, truncated, where Pi(K^T K) was.
  template <class P, class FamilyT>
  void update(const FamilyT& family, FactorTask& task) {
    const P* k = static_cast<const P*>(task.k);
    P* product = static_cast<P*>(task.gram.data);
    const ConstArray m{task.new_momentum.data, task.new_momentum.type};
    if (multiplies_momentum(task)) {
      task.update_scale = -task.beta1;
      return family.template product<AtenMath, P>(k, static_cast<const P*>(m.data), product);
    }
    P *e = reinterpret_cast<P*>(scratch_), *square = e + task.size;
    copy(task, m, -task.beta1, {e, task.gram.type});
    if (options_.expm_order == 2) {
      family.template product<AtenMath, P>(e, e, square);
      AtenMath::add_scaled(square, task.size, 0.5, e);
    }
    family.template product<AtenMath, P>(k, e, product);
  }

  void commit(const FactorTask& task) const {
    if (has_local_products(task.layout)) {
      local_candidates(task, true);
      return;
    }
    parallel(task, [&](int64_t begin, int64_t end) { kernels_of(task).commit(task, begin, end); });
  }

  static void copy(const FactorTask& task, ConstArray from, double scale, const Array& to) {
    parallel(task, [&](int64_t begin, int64_t end) {
      kernels_of(task).copy(from, scale, begin, end, to);
    });
  }

  // f(begin, end) over the slots of a task.
  template <class Function>
  static void parallel(const FactorTask& task, Function f) {
    AtenMath::parallel_for(task.size, 1, f);
  }

  at::Tensor& workspace_;
  const FactorOptions options_;
  std::byte* scratch_ = nullptr;
};

}  // namespace singd::cpu
