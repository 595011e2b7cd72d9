// update_factors_ for a layer with a factor whose products are ATen's: dense, triangular, Toeplitz,
// or with wide blocks or borders. One layer after the other in the same memory, each in all
// threads.
#pragma once

#include <atomic>

#include "../structures/registry.h"
#include "arena.h"
#include "local_factors.h"
#include "math.h"

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
        allocate_task(*task, arena);
        const int64_t numbers = has_local_products(task->layout)
                                    ? factor_scratch(task->layout)
                                    : task->size + 2 * task->layout.dim;
        scratch = std::max(scratch, numbers * element_size(task->statistic.type));
      }
      scratch_ = arena.take<std::byte>(scratch);
    });
    for (FactorTask* task : {&k, &c}) curvature(*task);
    candidate(k, c);
    candidate(c, k);
    if (k.finite && c.finite) {
      commit_task(k);
      commit_task(c);
    }
  }

 private:
  static const FactorKernels& kernels_of(const FactorTask& task) {
    return kernels().factors(task.statistic.type);
  }

  template <class Function>
  static void dispatch(const FactorTask& task, Function f) {
    dispatch_compute(task.statistic.type == Scalar::kFloat64 ? at::kDouble : at::kFloat, f);
  }

  void curvature(FactorTask& task) {
    if (has_local_products(task.layout)) return kernels_of(task).curvature(task, scratch_);
    dispatch(task, [&](auto zero) { whole_curvature<decltype(zero)>(task); });
  }

  void candidate(FactorTask& task, const FactorTask& partner) {
    if (has_local_products(task.layout)) {
      return kernels_of(task).candidate(task, partner, options_, scratch_);
    }
    dispatch(task, [&](auto zero) { whole_candidate<decltype(zero)>(task, partner); });
  }

  template <class T>
  void whole_curvature(FactorTask& task) {
    T *k = static_cast<T*>(task.k), *h = static_cast<T*>(task.h);
    T* gram = static_cast<T*>(task.gram);
    parallel(task, [&](int64_t begin, int64_t end) { kernels_of(task).load(task, begin, end); });
    visit(task.layout, [&](const auto& family) {
      family.template conjugate<AtenMath, T>(k, static_cast<const T*>(task.statistic.data), h);
      if (in_bfloat16(task)) {
        gram_in_bfloat16(task, gram);
      } else {
        family.template gram<AtenMath, T>(k, gram);
      }
      parallel(task, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) h[i] = static_cast<T>(h[i] * task.scale);
      });
      const double d = static_cast<double>(task.layout.dim);
      task.mean_trace_h = static_cast<double>(family.trace(h)) / d;
      task.mean_trace_gram = static_cast<double>(family.trace(gram)) / d;
    });
  }

  // As in simd/candidates.h.
  template <class T>
  void whole_candidate(FactorTask& task, const FactorTask& partner) {
    T *k = static_cast<T*>(task.k), *m = static_cast<T*>(task.h), *e = static_cast<T*>(task.gram);
    T* product = reinterpret_cast<T*>(scratch_);
    parallel(task, [&](int64_t begin, int64_t end) {
      kernels_of(task).momentum(task, partner, options_, begin, end);
    });
    visit(task.layout, [&](const auto& family) {
      family.add_to_diagonal(m, static_cast<T>(-options_.momentum_scale()));
      parallel(task, [&](int64_t begin, int64_t end) {
        kernels_of(task).old_momentum(task, options_, begin, end);
      });
      const double bound =
          task.layout.family == Family::kToeplitz
              ? Toeplitz(task.layout).norm_bound(m)
              : kernels_of(task).norm(task.layout, m, reinterpret_cast<double*>(scratch_));
      const double beta = step_size(task, bound, m);
      parallel(task, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) e[i] = static_cast<T>(-beta * m[i]);
      });
      if (options_.expm_order == 2) {
        multiply<T>(family, task, e, product);
        parallel(task, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) e[i] += product[i] / 2;
        });
      }
      multiply<T>(family, task, k, product);
    });
    std::atomic<bool> finite{true};
    parallel(task, [&](int64_t begin, int64_t end) {
      const FactorKernels& f = kernels_of(task);
      if (!f.store(product, k, begin, end, task.next_factor, task.key.stream(0))) finite = false;
      if (!f.store(m, nullptr, begin, end, task.next_momentum, task.key.stream(1))) finite = false;
    });
    task.finite = finite;
  }

  template <class T>
  double step_size(FactorTask& task, double bound, const T* m) const {
    double beta = options_.lr_cov;
    if (options_.normalize_lr_cov) {
      double largest = 1.0;
      for (int64_t i = 0; i < task.size; ++i) {
        largest = std::max(largest, std::abs(static_cast<double>(m[i])));
      }
      beta /= largest;
    }
    task.capped = beta * bound > options_.step_cap;
    return task.capped ? options_.step_cap / bound : beta;
  }

  // A dense factor that is stored in bfloat16 is multiplied in it, with sums in float32, at a
  // quarter of the time. What is rounded, K^T K and the small K E that is added to K, then still is
  // finer than K's own last place.
  static bool in_bfloat16(const FactorTask& task) {
    return task.layout.family == Family::kDense && task.factor.type == Scalar::kBFloat16 &&
           task.statistic.type == Scalar::kFloat32;
  }

  template <class T>
  static void gram_in_bfloat16(FactorTask& task, T* gram) {
    const int64_t d = task.layout.dim;
    const MatrixView<const at::BFloat16> k{static_cast<const at::BFloat16*>(task.factor.data), d};
    const MatrixView<at::BFloat16> result{static_cast<at::BFloat16*>(task.next_factor.data), d};
    AtenMath::multiply_symmetric(d, d, k, k, result, false);
    widen(task, task.next_factor, gram);
    Dense(task.layout).template weigh_gram<AtenMath>(gram);
  }

  // product = A E for A = K or A = E; E is where Pi(K^T K) was. The memory of the candidates, which
  // come later, holds bfloat16 copies.
  template <class T, class FamilyT>
  static void multiply(const FamilyT& family, FactorTask& task, const T* a, T* product) {
    const T* e = static_cast<const T*>(task.gram);
    if (!in_bfloat16(task)) return family.template product<AtenMath, T>(a, e, product);
    const int64_t d = task.layout.dim;
    const Array narrow{task.next_momentum.data, Scalar::kBFloat16};
    parallel(task, [&](int64_t begin, int64_t end) {
      kernels_of(task).store(e, nullptr, begin, end, narrow, RoundingKey{});
    });
    const void* left = a == e ? narrow.data : task.factor.data;
    AtenMath::multiply(
        d, d, d, MatrixView<const at::BFloat16>{static_cast<const at::BFloat16*>(left), d},
        MatrixView<const at::BFloat16>{static_cast<const at::BFloat16*>(narrow.data), d},
        MatrixView<at::BFloat16>{static_cast<at::BFloat16*>(task.next_factor.data), d});
    widen(task, task.next_factor, product);
  }

  static void widen(const FactorTask& task, const Array& from, void* to) {
    FactorTask view = task;
    view.factor = from;
    view.k = to;
    parallel(task, [&](int64_t begin, int64_t end) { kernels_of(task).load(view, begin, end); });
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
