// Tasks shared out among threads, each of which begins with its own and then helps the others.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

namespace singd::cpu {

// f(thread) in so many threads, or in fewer of them one after the other.
template <class Function>
void in_threads(size_t threads, Function f) {
  at::parallel_for(0, static_cast<int64_t>(threads), 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) f(static_cast<size_t>(t));
  });
}

template <class Task>
class Shares {
 public:
  // For so many threads, without tasks; about so many will come.
  void begin(size_t threads, size_t tasks) {
    shares_ = std::vector<Share>(threads);
    for (Share& share : shares_) share.tasks.reserve(tasks / threads + kMore);
  }

  // Tasks [first, first + count), task(index) each. Those of several calls begin their shares in
  // `turn`, so that calls with fewer tasks than threads are spread.
  template <class Function>
  void add(size_t first, size_t count, size_t turn, Function task) {
    const size_t threads = shares_.size();
    turn %= threads;
    for (size_t t = 0; t < threads; ++t) {
      const size_t last = first + (count * (t + 1) + turn) / threads;
      for (size_t i = first + (count * t + turn) / threads; i < last; ++i) {
        shares_[t].tasks.push_back(task(i));
      }
    }
  }

  // A task for one thread's share.
  void give(size_t thread, Task task) { shares_[thread].tasks.push_back(task); }

  // f(task, thread) for all.
  template <class Function>
  void run(Function f) {
    in_threads(shares_.size(), [&](size_t thread) { work(thread, f); });
  }

  // f(task, thread) for what nobody has taken yet: all are taken then, perhaps not done.
  template <class Function>
  void work(size_t thread, Function& f) {
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(thread + i) % shares_.size()];
      for (size_t n = share.next++; n < share.tasks.size(); n = share.next++) {
        f(share.tasks[n], thread);
      }
    }
  }

 private:
  // Lines of their own: threads count in them.
  struct alignas(64) Share {
    std::vector<Task> tasks;
    std::atomic<size_t> next{0};
  };

  static constexpr size_t kMore = 8;  // of one share than of others

  std::vector<Share> shares_;
};

}  // namespace singd::cpu
