// Launches, blocks and the order of threads.
#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "async_copies.h"
#include "block.h"
#include "counters.h"

namespace singd::emulation {

Running running;
Emulator emulator;

unsigned lanes_of(int warp) {
  const int lanes = std::min(kWarp, emulator.threads - warp * kWarp);
  return lanes == kWarp ? 0xFFFFFFFFu : (1u << lanes) - 1;
}

void release(int* threads, int count) {
  for (int i = count - 1; emulator.seed != 0 && i > 0; --i) {
    std::swap(threads[i], threads[emulator.random.below(static_cast<unsigned>(i) + 1)]);
  }
  for (int i = 0; i < count; ++i) {
    emulator.thread[threads[i]].state = State::kReady;
    emulator.queue.push(threads[i]);
  }
}

void release_block() {
  int threads[kMaxThreads];
  std::iota(threads, threads + emulator.threads, 0);
  release(threads, emulator.threads);
}

void leave() {
  const int from = self();
  if (emulator.queue.empty()) {
    switch_fiber(emulator.thread[from].fiber, emulator.main);
    return;
  }
  const int to = emulator.queue.pop(emulator.random);
  if (to == from) return;
  running.thread.x = static_cast<unsigned>(to);
  switch_fiber(emulator.thread[from].fiber, emulator.thread[to].fiber);
}

namespace {

constexpr size_t kMaxSharedBytes = 163 * 1024;  // what sm_80 gives a block
constexpr size_t kSharedAlignment = 128;

std::string where(int64_t block) {
  return "kernel " + std::string(emulator.kernel) + ", block " + std::to_string(block);
}

[[noreturn]] void thread_entry() {
  fiber_entered();
  try {
    emulator.body(emulator.data);
    if (!copies_landed(self())) fail("it ended before its asynchronous copies");
  } catch (...) {
    emulator.error = std::current_exception();
  }
  Thread& thread = emulator.thread[self()];
  thread.state = State::kEnded;
  if (emulator.error) {
    switch_fiber(thread.fiber, emulator.main);
  } else {
    leave();
  }
  std::abort();  // an ended thread is never resumed
}

void check_all_ended(int64_t block) {
  int waiting = -1;
  for (int i = emulator.threads - 1; i >= 0; --i) {
    if (emulator.thread[i].state != State::kEnded) waiting = i;
  }
  if (waiting < 0) return;
  std::string reason = where(block) + ": " + describe(waiting) + " for ever";
  // Another one that does not wait there tells more than the rest.
  for (int i = 0; i < emulator.threads; ++i) {
    const Thread& t = emulator.thread[i];
    const Thread& w = emulator.thread[waiting];
    if (t.state != w.state || t.site.line != w.site.line || t.mask != w.mask) {
      reason += "; " + describe(i);
      break;
    }
  }
  throw Error(reason);
}

void begin_block(int64_t block) {
  static constexpr Order kOrders[] = {Order::kOldest, Order::kNewest, Order::kAny};
  emulator.random.state =
      emulator.seed ^ (emulator.launches << 40) ^ (static_cast<uint64_t>(block) << 8);
  emulator.random.next();
  emulator.queue.reset(emulator.seed == 0 ? Order::kOldest : kOrders[emulator.random.below(3)]);
  emulator.at_barrier = 0;
  std::memset(emulator.in_warp, 0, sizeof emulator.in_warp);
  for (int i = 0; i < emulator.threads; ++i) {
    Thread& t = emulator.thread[i];
    emulator.stacks.prepare(t.fiber, static_cast<size_t>(i), thread_entry);
  }
  std::memset(running.shared, 0xFF, running.shared_bytes);
  poison_static_shared();
  forget_copies();
  running.block.x = static_cast<unsigned>(block);
  release_block();
}

void run_block(int64_t block) {
  begin_block(block);
  const int first = emulator.queue.pop(emulator.random);
  running.thread.x = static_cast<unsigned>(first);
  switch_fiber(emulator.main, emulator.thread[first].fiber);
  if (emulator.error) std::rethrow_exception(std::exchange(emulator.error, nullptr));
  check_all_ended(block);
  if (counting) count_block_converged();
}

void check_launch(int threads, size_t shared_bytes) {
  if (threads < 1 || threads > kMaxThreads) {
    throw Error("kernel " + std::string(emulator.kernel) + ": a block of " +
                std::to_string(threads) + " threads");
  }
  if (shared_bytes > kMaxSharedBytes) {
    throw Error("kernel " + std::string(emulator.kernel) + ": " + std::to_string(shared_bytes) +
                " bytes of shared memory are more than every GPU has");
  }
}

struct Free {
  void operator()(char* p) const { std::free(p); }
};

std::unique_ptr<char, Free> allocate_shared(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, kSharedAlignment, bytes) != 0) throw std::bad_alloc();
  return std::unique_ptr<char, Free>(static_cast<char*>(p));
}

}  // namespace

void set_seed(uint64_t seed) {
  emulator.seed = seed;
  emulator.launches = 0;
}

void set_random_blocks(bool random) { emulator.random_blocks = random; }

void run(const char* kernel, int64_t blocks, int threads, size_t shared_bytes,
         void (*body)(const void*), const void* data) {
  const std::lock_guard<std::mutex> lock(emulator.mutex);
  emulator.kernel = kernel;
  emulator.body = body;
  emulator.data = data;
  emulator.threads = threads;
  ++emulator.launches;
  check_launch(threads, shared_bytes);
  const auto shared = allocate_shared(shared_bytes);
  running.shared = shared.get();
  running.shared_bytes = shared_bytes;
  running.block_dim.x = static_cast<unsigned>(threads);
  running.grid_dim.x = static_cast<unsigned>(blocks);
  if (counting) count_launch(kernel, blocks, threads);
  if (!emulator.random_blocks) {
    for (int64_t block = 0; block < blocks; ++block) run_block(block);
    return;
  }
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), int64_t{0});
  Random random{emulator.seed + emulator.launches};
  for (size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[random.below(static_cast<unsigned>(i))]);
  }
  for (const int64_t block : order) run_block(block);
}

void fail(const std::string& reason) {
  throw Error(where(running.block.x) + ", thread " + std::to_string(self()) + ": " + reason);
}

void fail_alignment(const char* what, const void* p, size_t bytes) {
  fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at an address that is " +
       std::to_string(reinterpret_cast<uintptr_t>(p) % bytes) + " modulo " + std::to_string(bytes));
}

}  // namespace singd::emulation
