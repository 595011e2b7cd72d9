// update_factors_ for layers whose two factors have local products: all layers at once, in threads.
//
//   curvature   H, Pi(K^T K) and their traces of every factor
//   candidate   the new momentum and factor as they would be stored, and whether they are finite
//   commit      of the layers where all four are finite
//
// Layers go in groups that stay in the last cache from the one to the other.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "arena.h"
#include "kernels.h"

namespace singd::cpu {

inline int64_t element_size(Scalar type) {
  switch (type) {
    case Scalar::kFloat64:
      return 8;
    case Scalar::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// Memory of one task; all of it is behind its arena.
inline void allocate_task(FactorTask& task, Arena& arena) {
  const auto take = [&](Scalar type) -> void* {
    return arena.take<std::byte>((task.size + kPadding) * element_size(type));
  };
  // Rows of blocks are padded.
  const int64_t rows = task.layout.dim * padded(task.layout.block);
  const int64_t bytes = (std::max(task.size, rows) + kPadding) * element_size(task.statistic.type);
  for (void** numbers : {&task.k, &task.h, &task.gram}) *numbers = arena.take<std::byte>(bytes);
  task.next_factor = {take(task.factor.type), task.factor.type};
  const Scalar momentum = task.momentum.data != nullptr ? task.momentum.type : task.factor.type;
  task.next_momentum = {take(momentum), momentum};
}

// The candidates take the place of the old state.
inline void commit_task(const FactorTask& task) {
  const auto copy = [&](const Array& to, const Array& from) {
    std::memcpy(to.data, from.data, static_cast<size_t>(task.size * element_size(to.type)));
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
    const int64_t limit = std::max<int64_t>(kGroup, kGroupOfThread * at::get_num_threads());
    for (size_t begin = 0; begin < tasks.size();) {
      size_t end = begin;
      int64_t elements = 0;
      do {
        elements += tasks[end].size + tasks[end + 1].size;
        end += 2;
      } while (end < tasks.size() && elements + tasks[end].size + tasks[end + 1].size <= limit);
      run_group(tasks.data() + begin, end - begin, elements);
      begin = end;
    }
  }

 private:
  // Numbers stored of a group, and at least for every thread.
  static constexpr int64_t kGroup = int64_t{1} << 17, kGroupOfThread = int64_t{1} << 16;
  // Numbers below which a further thread costs more than it saves.
  static constexpr int64_t kGrain = 8192;

  void run_group(FactorTask* tasks, size_t count, int64_t elements) {
    const int64_t threads =
        std::clamp<int64_t>(elements / kGrain, 1, std::min<int64_t>(count, at::get_num_threads()));
    int64_t scratch = 0;
    for (size_t i = 0; i < count; ++i) {
      const int64_t numbers = factor_scratch(tasks[i].layout);
      scratch = std::max(scratch, numbers * element_size(tasks[i].statistic.type));
    }
    std::byte* memory = nullptr;
    Arena::run(workspace_, [&](Arena& arena) {
      for (size_t i = 0; i < count; ++i) allocate_task(tasks[i], arena);
      scratch = (scratch + 63) / 64 * 64;
      memory = arena.take<std::byte>(scratch * threads);
    });
    const auto kernels_of = [](const FactorTask& task) -> const FactorKernels& {
      return kernels().factors(task.statistic.type);
    };
    in_turns(threads, count, [&](size_t i, int64_t thread) {
      kernels_of(tasks[i]).curvature(tasks[i], memory + thread * scratch);
    });
    in_turns(threads, count, [&](size_t i, int64_t thread) {
      FactorTask& task = tasks[i];
      kernels_of(task).candidate(task, tasks[i ^ 1], options_, memory + thread * scratch);
    });
    in_turns(threads, count, [&](size_t i, int64_t) {
      if (tasks[i].finite && tasks[i ^ 1].finite) commit_task(tasks[i]);
    });
  }

  // f(index, thread) for all of them: tasks differ in size, so a thread takes the next one.
  template <class Function>
  static void in_turns(int64_t threads, size_t count, Function f) {
    std::atomic<size_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        for (size_t i = next++; i < count; i = next++) f(i, thread);
      }
    });
  }

  at::Tensor& workspace_;
  const FactorOptions options_;
};

}  // namespace singd::cpu
