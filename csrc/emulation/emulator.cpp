#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "fiber.h"

namespace singd::emulation {

Running running;

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 163 * 1024;  // what sm_80 gives a block
constexpr size_t kSharedAlignment = 128;

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kSyncThreads:
      return "__syncthreads";
    case Operation::kSyncThreadsOr:
      return "__syncthreads_or";
    case Operation::kSyncThreadsAnd:
      return "__syncthreads_and";
    case Operation::kSyncThreadsCount:
      return "__syncthreads_count";
    case Operation::kSyncWarp:
      return "__syncwarp";
    case Operation::kShuffle:
      return "__shfl_sync";
    case Operation::kShuffleXor:
      return "__shfl_xor_sync";
    case Operation::kShuffleUp:
      return "__shfl_up_sync";
    case Operation::kShuffleDown:
      return "__shfl_down_sync";
    case Operation::kBallot:
      return "__ballot_sync";
    case Operation::kAny:
      return "__any_sync";
    default:
      return "__all_sync";
  }
}

struct Random {
  uint64_t state;
  uint64_t next() {  // SplitMix64
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned n) { return static_cast<unsigned>((next() >> 32) * n >> 32); }
};

enum class State { kReady, kAtBarrier, kInWarp, kEnded };

struct Thread {
  Fiber fiber;
  State state;
  // What it waits for, or waited for last.
  Operation operation;
  Site site;
  unsigned mask;
  int argument;
  int width;
  uint64_t value;   // given
  uint64_t result;  // received
  uint64_t matrix_calls;
  uint64_t matrix_hash;
};

// Which of the threads that can go on goes on. Each order finds other missing barriers: kOldest
// keeps the threads close together, kNewest lets one warp run far ahead.
enum class Order { kOldest, kNewest, kAny };

// The threads that can go on; a thread is in it at most once.
class Queue {
 public:
  void reset(Order order) {
    order_ = order;
    first_ = last_ = 0;
  }
  bool empty() const { return first_ == last_; }
  void push(int thread) { threads_[last_++ % kMaxThreads] = thread; }
  int pop(Random& random) {
    if (order_ == Order::kOldest) return threads_[first_++ % kMaxThreads];
    --last_;
    int& end = threads_[last_ % kMaxThreads];
    if (order_ == Order::kAny) {
      std::swap(end, threads_[(first_ + random.below(last_ - first_ + 1)) % kMaxThreads]);
    }
    return end;
  }

 private:
  Order order_ = Order::kOldest;
  unsigned first_ = 0, last_ = 0;  // count up without end; kMaxThreads divides 2^32
  int threads_[kMaxThreads];
};

struct Emulator {
  std::mutex mutex;
  uint64_t seed = 0;
  bool random_blocks = false;
  uint64_t launches = 0;  // since the seed was set

  const char* kernel = "";
  void (*body)(const void*) = nullptr;
  const void* data = nullptr;
  int threads = 0;
  Thread thread[kMaxThreads];
  unsigned in_warp[kMaxThreads / kWarp];  // lanes that wait for others of their warp
  int at_barrier = 0;                     // how many threads wait there, and the first of them
  int first_at_barrier = 0;
  int votes = 0;
  Queue queue;
  Random random{0};
  StackPool stacks;
  Fiber main;
  std::exception_ptr error;
};

Emulator e;

int self() { return static_cast<int>(running.thread.x); }

std::string describe(int thread) {
  const Thread& t = e.thread[thread];
  const std::string name = "thread " + std::to_string(thread);
  if (t.state == State::kEnded) return name + " has ended";
  return name + " waits in " + name_of(t.operation) + " (" + t.site.file + ":" +
         std::to_string(t.site.line) + ")";
}

std::string where(int64_t block) {
  return "kernel " + std::string(e.kernel) + ", block " + std::to_string(block);
}

// Lets the threads go on, in an order that the seed shuffles.
void release(int* threads, int count) {
  for (int i = count - 1; e.seed != 0 && i > 0; --i) {
    std::swap(threads[i], threads[e.random.below(static_cast<unsigned>(i) + 1)]);
  }
  for (int i = 0; i < count; ++i) {
    e.thread[threads[i]].state = State::kReady;
    e.queue.push(threads[i]);
  }
}

void release_block() {
  int threads[kMaxThreads];
  std::iota(threads, threads + e.threads, 0);
  release(threads, e.threads);
}

void release_lanes(int first, unsigned mask) {
  int threads[kWarp];
  int count = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) threads[count++] = first + lane;
  }
  release(threads, count);
}

// Goes on with another thread; with the launching code if there is none.
void leave() {
  const int from = self();
  if (e.queue.empty()) {
    switch_fiber(e.thread[from].fiber, e.main);
    return;
  }
  const int to = e.queue.pop(e.random);
  if (to == from) return;
  running.thread.x = static_cast<unsigned>(to);
  switch_fiber(e.thread[from].fiber, e.thread[to].fiber);
}

[[noreturn]] void thread_entry() {
  fiber_entered();
  try {
    e.body(e.data);
  } catch (...) {
    e.error = std::current_exception();
  }
  Thread& thread = e.thread[self()];
  thread.state = State::kEnded;
  if (e.error) {
    switch_fiber(thread.fiber, e.main);
  } else {
    leave();
  }
  std::abort();  // an ended thread is never resumed
}

void check_same_operation(int a, int b) {
  const Thread& first = e.thread[a];
  const Thread& second = e.thread[b];
  if (first.operation == second.operation && first.site.line == second.site.line &&
      first.width == second.width && std::strcmp(first.site.file, second.site.file) == 0) {
    return;
  }
  fail(describe(a) + ", but " + describe(b));
}

void check_all_ended(int64_t block) {
  int ended = -1, waiting = -1;
  for (int i = e.threads - 1; i >= 0; --i) {
    (e.thread[i].state == State::kEnded ? ended : waiting) = i;
  }
  if (waiting < 0) return;
  std::string reason = where(block) + ": " + describe(waiting) + " for ever";
  // Another one that does not wait there tells more than the rest.
  for (int i = 0; i < e.threads; ++i) {
    const Thread& t = e.thread[i];
    const Thread& w = e.thread[waiting];
    if (t.state != w.state || t.site.line != w.site.line || t.mask != w.mask) {
      reason += "; " + describe(i);
      break;
    }
  }
  throw Error(reason);
}

void check_matrix_calls(int64_t block) {
  for (int i = 0; i < e.threads; ++i) {
    const Thread& lane0 = e.thread[i / kWarp * kWarp];
    const Thread& t = e.thread[i];
    if (t.matrix_calls == lane0.matrix_calls && t.matrix_hash == lane0.matrix_hash) continue;
    throw Error(where(block) + ": thread " + std::to_string(i) + " made " +
                std::to_string(t.matrix_calls) + " calls of wmma, lane 0 of its warp " +
                std::to_string(lane0.matrix_calls) +
                "; all lanes must make the same calls with the same arguments");
  }
}

void begin_block(int64_t block) {
  static constexpr Order kOrders[] = {Order::kOldest, Order::kNewest, Order::kAny};
  e.random.state = e.seed ^ (e.launches << 40) ^ (static_cast<uint64_t>(block) << 8);
  e.random.next();
  e.queue.reset(e.seed == 0 ? Order::kOldest : kOrders[e.random.below(3)]);
  e.at_barrier = 0;
  std::memset(e.in_warp, 0, sizeof e.in_warp);
  for (int i = 0; i < e.threads; ++i) {
    Thread& t = e.thread[i];
    t.matrix_calls = t.matrix_hash = 0;
    e.stacks.prepare(t.fiber, static_cast<size_t>(i), thread_entry);
  }
  std::memset(running.shared, 0xFF, running.shared_bytes);
  running.block.x = static_cast<unsigned>(block);
  release_block();
}

void run_block(int64_t block) {
  begin_block(block);
  const int first = e.queue.pop(e.random);
  running.thread.x = static_cast<unsigned>(first);
  switch_fiber(e.main, e.thread[first].fiber);
  if (e.error) std::rethrow_exception(std::exchange(e.error, nullptr));
  check_all_ended(block);
  check_matrix_calls(block);
}

void check_launch(int threads, size_t shared_bytes) {
  if (threads < 1 || threads > kMaxThreads) {
    throw Error("kernel " + std::string(e.kernel) + ": a block of " + std::to_string(threads) +
                " threads");
  }
  if (shared_bytes > kMaxSharedBytes) {
    throw Error("kernel " + std::string(e.kernel) + ": " + std::to_string(shared_bytes) +
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
  e.seed = seed;
  e.launches = 0;
}

void set_random_blocks(bool random) { e.random_blocks = random; }

void run(const char* kernel, int64_t blocks, int threads, size_t shared_bytes,
         void (*body)(const void*), const void* data) {
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.kernel = kernel;
  e.body = body;
  e.data = data;
  e.threads = threads;
  ++e.launches;
  check_launch(threads, shared_bytes);
  const auto shared = allocate_shared(shared_bytes);
  running.shared = shared.get();
  running.shared_bytes = shared_bytes;
  running.block_dim.x = static_cast<unsigned>(threads);
  running.grid_dim.x = static_cast<unsigned>(blocks);
  if (!e.random_blocks) {
    for (int64_t block = 0; block < blocks; ++block) run_block(block);
    return;
  }
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), int64_t{0});
  Random random{e.seed + e.launches};
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
       std::to_string(reinterpret_cast<uintptr_t>(p) % bytes) + " modulo " +
       std::to_string(bytes));
}

int synchronize(Operation operation, bool predicate, Site site) {
  const int thread = self();
  Thread& t = e.thread[thread];
  t.state = State::kAtBarrier;
  t.operation = operation;
  t.site = site;
  t.mask = 0;
  t.width = 0;
  if (e.at_barrier == 0) {
    e.first_at_barrier = thread;
    e.votes = 0;
  } else {
    check_same_operation(e.first_at_barrier, thread);
  }
  e.votes += predicate ? 1 : 0;
  if (++e.at_barrier == e.threads) {
    const int votes = e.votes;
    const int result = operation == Operation::kSyncThreadsOr    ? votes != 0
                       : operation == Operation::kSyncThreadsAnd ? votes == e.threads
                                                                 : votes;
    for (int i = 0; i < e.threads; ++i) e.thread[i].result = static_cast<uint64_t>(result);
    e.at_barrier = 0;
    release_block();
  }
  leave();
  return static_cast<int>(t.result);
}

namespace {

// The lane that a shuffle reads; its own where the source is outside of its group of `width`.
int source_of(const Thread& t, int lane) {
  const int base = lane & ~(t.width - 1);
  const int last = base + t.width - 1;
  int source = lane;
  switch (t.operation) {
    case Operation::kShuffle:
      return base | (t.argument & (t.width - 1));
    case Operation::kShuffleXor:
      source = lane ^ t.argument;
      return source > last ? lane : source;
    case Operation::kShuffleUp:
      source = lane - t.argument;
      return source < base ? lane : source;
    default:
      source = lane + t.argument;
      return source > last ? lane : source;
  }
}

bool is_shuffle(Operation operation) {
  return operation >= Operation::kShuffle && operation <= Operation::kShuffleDown;
}

// Gives every lane of the mask, all of which have arrived, its result.
void resolve(int first, unsigned mask) {
  unsigned ballot = 0;
  int reference = -1;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (reference < 0) reference = first + lane;
    check_same_operation(reference, first + lane);
    if (e.thread[first + lane].value != 0) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& t = e.thread[first + lane];
    if (is_shuffle(t.operation)) {
      const int source = source_of(t, lane);
      // What an absent lane would give is undefined.
      t.result = mask >> source & 1 ? e.thread[first + source].value : ~uint64_t{0};
    } else {
      t.result = t.operation == Operation::kAny   ? ballot != 0
                 : t.operation == Operation::kAll ? ballot == mask
                                                  : ballot;
    }
  }
}

}  // namespace

uint64_t exchange(Operation operation, unsigned mask, uint64_t value, int argument, int width,
                  Site site) {
  const int thread = self();
  const int warp = thread / kWarp, lane = thread % kWarp;
  const int lanes = std::min(kWarp, e.threads - warp * kWarp);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  Thread& t = e.thread[thread];
  t.state = State::kInWarp;
  t.operation = operation;
  t.site = site;
  t.mask = mask;
  t.argument = argument;
  t.width = width;
  t.value = value;
  if (!(mask >> lane & 1)) fail(std::string(name_of(operation)) + ": its mask lacks this lane");
  e.in_warp[warp] |= 1u << lane;
  bool complete = (e.in_warp[warp] & mask) == mask;
  for (int i = 0; complete && i < lanes; ++i) {
    complete = !(mask >> i & 1) || e.thread[warp * kWarp + i].mask == mask;
  }
  if (complete) {
    resolve(warp * kWarp, mask);
    e.in_warp[warp] &= ~mask;
    release_lanes(warp * kWarp, mask);
  }
  leave();
  return t.result;
}

bool matrix_call(const void* p, Site site) {
  Thread& t = e.thread[self()];
  ++t.matrix_calls;
  const uint64_t what = reinterpret_cast<uintptr_t>(p) ^ (static_cast<uint64_t>(site.line) << 48);
  t.matrix_hash = (t.matrix_hash ^ what) * 0x9E3779B97F4A7C15u;
  return self() % kWarp == 0;
}

}  // namespace singd::emulation
