// The state of the block that runs, shared by what schedules its threads (emulator.cpp) and what
// makes them wait for one another (collectives.cpp).
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <utility>

#include "emulator.h"
#include "fiber.h"

namespace singd::emulation {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

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

// One launch runs at a time.
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

extern __attribute__((visibility("hidden"))) Emulator emulator;

inline int self() { return static_cast<int>(running.thread.x); }

// A mask of the lanes that the warp has: the last one of a block may be incomplete.
unsigned lanes_of(int warp);

// What the thread waits in, for messages.
std::string describe(int thread);

// Lets the threads go on, in an order that the seed shuffles.
void release(int* threads, int count);
void release_block();

// Goes on with another thread; with the launching code if there is none.
void leave();

}  // namespace singd::emulation
