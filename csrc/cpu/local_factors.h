// update_factors_ for layers whose two factors have local products: each layer in one thread, whose
// caches have all of it from the first to the last of
//
//   curvature   H, Pi(K^T K) and their traces of both factors
//   candidate   the new momenta and factors as they would be stored, and whether they are finite
//   commit      where all four are finite
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "shares.h"

namespace singd::cpu {

// Memory of one task; all of it is behind its arena.
inline void allocate_task(FactorTask& task, Arena& arena) {
  const auto take = [&](Scalar type) -> void* {
    return arena.take<std::byte>((task.size + kPadding) * size_of(type));
  };
  // Rows of blocks and borders are padded.
  const Layout& layout = task.layout;
  const int64_t blocks = layout.dim * padded(layout.block);
  const int64_t border = (layout.head + layout.tail) * padded(layout.dim);
  const int64_t numbers = std::max({task.size, blocks, border}) + kPadding;
  const int64_t bytes = numbers * size_of(task.statistic.type);
  for (void** memory : {&task.k, &task.h}) *memory = arena.take<std::byte>(bytes);
  task.gram = {arena.take<std::byte>(bytes), task.statistic.type};
  task.next_factor = {take(task.factor.type), task.factor.type};
  const Scalar momentum = task.momentum.data != nullptr ? task.momentum.type : task.factor.type;
  // The new momentum is where it is made, unless it has to be converted or is in padded rows.
  const bool is_there = momentum == task.statistic.type && layout.family != Family::kBlockDiagonal;
  task.next_momentum = {is_there ? task.h : take(momentum), momentum};
}

// The candidates take the place of the old state.
inline void commit_task(const FactorTask& task) {
  const auto copy = [&](const Array& to, const Array& from) {
    std::memcpy(to.data, from.data, static_cast<size_t>(task.size * size_of(to.type)));
  };
  copy(task.factor, task.next_factor);
  if (task.momentum.data != nullptr) copy(task.momentum, task.next_momentum);
}

// Two tasks a layer: K's and C's.
class LocalFactors {
 public:
  LocalFactors(at::Tensor& workspace, const FactorOptions& options)
      : workspace_(workspace), options_(options) {}

  void run(std::vector<FactorTask>& tasks) {
    if (tasks.empty()) return;
    const int64_t threads = share_out(tasks);
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
  int64_t share_out(std::vector<FactorTask>& tasks) {
    const size_t layers = tasks.size() / 2;
    const auto size = [&](size_t i) { return tasks[2 * i].size + tasks[2 * i + 1].size; };
    std::vector<size_t> order(layers);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return size(a) > size(b); });
    int64_t all = 0;
    for (size_t i = 0; i < layers; ++i) all += size(i);
    const int64_t most = std::min<int64_t>(layers, at::get_num_threads());
    const int64_t threads = std::clamp<int64_t>(all / kGrain, 1, most);
    shares_.begin(static_cast<size_t>(threads));
    std::vector<int64_t> load(threads);
    for (const size_t i : order) {
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
    kernels_of(k).curvature(k, scratch);
    kernels_of(c).curvature(c, scratch);
    kernels_of(k).candidate(k, c, options_, scratch);
    kernels_of(c).candidate(c, k, options_, scratch);
    if (!k.finite || !c.finite) return;
    commit_task(k);
    commit_task(c);
  }

  at::Tensor& workspace_;
  const FactorOptions options_;
  Shares<size_t> shares_;  // of the layers
  int64_t needed_ = 0;     // bytes for the largest of them
};

}  // namespace singd::cpu
