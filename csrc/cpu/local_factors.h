// update_factors_ for layers whose two factors have local products: each layer in one thread, whose
// caches have all of it from the first to the last of
//
//   curvature    H, Pi(K^T K) and their traces of both factors
//   momentum     the new momenta, and how far the factors step
//   candidates   of factors and momenta, to the state where all four are finite
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "shares.h"

namespace singd::cpu {

// Memory of one task; all of it is behind its arena.
inline void allocate_task(FactorTask& task, Arena& arena) {
  // Rows of blocks and borders are padded.
  const Layout& layout = task.layout;
  const int64_t blocks = layout.dim * padded(layout.block);
  const int64_t border = (layout.head + layout.tail + 1) * padded(layout.dim);
  const int64_t numbers = std::max({task.size, blocks, border}) + kPadding;
  const int64_t bytes = numbers * size_of(task.statistic.type);
  for (void** memory : {&task.k, &task.h}) *memory = arena.take<std::byte>(bytes);
  task.gram = {arena.take<std::byte>(bytes), task.statistic.type};
}

// Whether the norms alone say that no candidate overflows as it is stored, which saves a look at
// all of them: no entry of K exceeds ||K||_F, none of m ||m||, none of K m or beta1 m m the
// products of these, and none of E x + x^2 / 2 with x = beta1 ||m||. Rounding does not matter that
// far from overflow. NaN is not below any limit.
inline bool is_surely_finite(const FactorTask& task) {
  const Scalar momentum = task.momentum.data != nullptr ? task.momentum.type : task.factor.type;
  const bool in_float16 = Scalar::kFloat16 == task.factor.type || Scalar::kFloat16 == momentum;
  const double limit = in_float16 ? 1e3 : 1e35;
  const double m = task.momentum_norm, x = std::abs(task.beta1) * m;
  const double k = std::sqrt(task.mean_trace_gram * static_cast<double>(task.layout.dim));
  return m * std::max({x, k, 1.0}) < limit && std::max(k, 1.0) * (1 + x + x * x / 2) < limit;
}

// Two tasks a layer: K's and C's.
class LocalFactors {
 public:
  LocalFactors(at::Tensor& workspace, const FactorOptions& options)
      : workspace_(workspace), options_(options) {}

  // These layers of the tasks.
  void run(std::vector<FactorTask>& tasks, std::vector<size_t> layers) {
    if (layers.empty()) return;
    const int64_t threads = share_out(tasks, layers);
    std::byte* memory = nullptr;
    Arena::run(workspace_,
               [&](Arena& arena) { memory = arena.take<std::byte>(threads * needed_); });
    shares_.run([&](size_t layer, size_t thread) {
      const Arena own(memory + static_cast<int64_t>(thread) * needed_);
      update(tasks[2 * layer], tasks[2 * layer + 1], own);
    });
  }

 private:
  // Numbers below which a further thread costs more than it saves.
  static constexpr int64_t kGrain = 8192;

  static void* plan(FactorTask& k, FactorTask& c, Arena& arena) {
    int64_t scratch = 0;
    for (FactorTask* task : {&k, &c}) {
      allocate_task(*task, arena);
      const int64_t numbers = factor_scratch(task->layout);
      scratch = std::max(scratch, numbers * size_of(task->statistic.type));
    }
    return arena.take<std::byte>(scratch);
  }

  // The largest layers first, each to the thread that has least so far: the same in every step, but
  // for the last ones, which go to whoever is done. Returns how many threads there are.
  int64_t share_out(std::vector<FactorTask>& tasks, std::vector<size_t>& layers) {
    const auto size = [&](size_t i) { return tasks[2 * i].size + tasks[2 * i + 1].size; };
    std::stable_sort(layers.begin(), layers.end(),
                     [&](size_t a, size_t b) { return size(a) > size(b); });
    int64_t all = 0;
    for (const size_t i : layers) all += size(i);
    const int64_t most = std::min<int64_t>(layers.size(), at::get_num_threads());
    const int64_t threads = std::clamp<int64_t>(all / kGrain, 1, most);
    shares_.begin(static_cast<size_t>(threads), layers.size());
    std::vector<int64_t> load(threads);
    for (const size_t i : layers) {
      const auto share = std::min_element(load.begin(), load.end()) - load.begin();
      shares_.give(static_cast<size_t>(share), i);
      load[share] += size(i);
      const auto bytes = Arena::size([&](Arena& a) { plan(tasks[2 * i], tasks[2 * i + 1], a); });
      needed_ = std::max(needed_, bytes);
    }
    return threads;
  }

  void update(FactorTask& k, FactorTask& c, Arena arena) const {
    void* scratch = plan(k, c, arena);
    const auto kernels_of = [](const FactorTask& task) -> const FactorKernels& {
      return kernels().factors(task.statistic.type);
    };
    const auto candidates = [&](FactorTask& task, bool commit) {
      return kernels_of(task).local_candidates(task, options_, commit, scratch);
    };
    kernels_of(k).curvature(k, scratch);
    kernels_of(c).curvature(c, scratch);
    kernels_of(k).local_momentum(k, c, options_, scratch);
    kernels_of(c).local_momentum(c, k, options_, scratch);
    for (FactorTask* task : {&k, &c}) {
      task->finite = is_surely_finite(*task) || candidates(*task, false);
    }
    if (!k.finite || !c.finite) return;
    candidates(k, true);
    candidates(c, true);
  }

  at::Tensor& workspace_;
  const FactorOptions options_;
  Shares<size_t> shares_;  // of the layers
  int64_t needed_ = 0;     // bytes for the largest of them
};

}  // namespace singd::cpu
