// Tasks in rounds, between which no thread waits for all others: what is needed of the round before
// is counted.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>

#include "shares.h"

namespace singd::cpu {

enum Phase { kPrepare, kRead, kWrite };

class Round {
 public:
  struct Task {
    Phase phase;
    size_t layer, index;
  };

  // For so many threads, about so many tasks.
  void begin(size_t threads, size_t tasks) { shares_.begin(threads, tasks); }

  // Tasks [begin, end) of a layer.
  void add(Phase phase, size_t layer, size_t begin, size_t end) {
    left_[phase] += end - begin;
    shares_.add(begin, end - begin, layer, [&](size_t index) { return Task{phase, layer, index}; });
  }

  // run(task) for all that nobody has taken yet, and done(task, count) after so many of the same
  // phase and layer: what all threads count in is touched as seldom as that.
  template <class Run, class Done>
  void work(size_t thread, Run run, Done done) {
    Task last{};
    size_t count = 0;
    const auto settle = [&] {
      if (count == 0) return;
      done(last, count);
      left_[last.phase].fetch_sub(count, std::memory_order_acq_rel);
      count = 0;
    };
    const auto run_one = [&](const Task& task, size_t) {
      if (task.phase != last.phase || task.layer != last.layer) settle();
      run(task);
      last = task;
      ++count;
    };
    shares_.work(thread, run_one);
    settle();
  }

  // Until all of a phase are done. Those that are not are under way in other threads: whoever waits
  // has found none that he could take.
  void wait_for(Phase phase) const {
    constexpr int kSoon = 1000;
    for (int tries = 0; left_[phase].load(std::memory_order_acquire) > 0; ++tries) {
      if (tries > kSoon) std::this_thread::yield();
    }
  }

 private:
  Shares<Task> shares_;
  alignas(64) std::atomic<size_t> left_[3] = {};  // tasks of every phase that are not done
};

}  // namespace singd::cpu
