// Tasks shared out among threads, each of which begins with its own and then helps the others.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <deque>
#include <vector>

namespace singd::cpu {

template <class Task>
class Shares {
 public:
  // For so many threads, without tasks; memory is kept from one use to the next.
  void begin(size_t threads) {
    threads_ = threads;
    shares_.resize(std::max(shares_.size(), threads));
    for (size_t t = 0; t < threads; ++t) {
      shares_[t].tasks.clear();
      shares_[t].next = 0;
    }
  }

  // Tasks [first, first + count), task(index) each. Those of several calls begin their shares in
  // `turn`, so that calls with fewer tasks than threads are spread.
  template <class Function>
  void add(size_t first, size_t count, size_t turn, Function task) {
    turn %= threads_;
    for (size_t t = 0; t < threads_; ++t) {
      const size_t last = first + (count * (t + 1) + turn) / threads_;
      for (size_t i = first + (count * t + turn) / threads_; i < last; ++i) {
        shares_[t].tasks.push_back(task(i));
      }
    }
  }

  // A task for one thread's share.
  void give(size_t thread, Task task) { shares_[thread].tasks.push_back(task); }

  // f(task, thread) for all.
  template <class Function>
  void run(Function f) {
    at::parallel_for(0, static_cast<int64_t>(threads_), 1, [&](int64_t from, int64_t to) {
      for (auto t = static_cast<size_t>(from); t < static_cast<size_t>(to); ++t) {
        for (size_t i = 0; i < threads_; ++i) run(shares_[(t + i) % threads_], t, f);
      }
    });
  }

 private:
  // Lines of their own: threads count in them.
  struct alignas(64) Share {
    std::vector<Task> tasks;
    std::atomic<size_t> next{0};
  };

  template <class Function>
  static void run(Share& share, size_t thread, Function& f) {
    for (size_t i = share.next++; i < share.tasks.size(); i = share.next++) {
      f(share.tasks[i], thread);
    }
  }

  size_t threads_ = 0;
  std::deque<Share> shares_;
};

}  // namespace singd::cpu
