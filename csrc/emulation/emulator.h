// The emulator: runs a kernel's threads as fibers of one operating-system thread. Kernels see it
// through cuda.h; tests steer it by the functions of the first part.
//
// The threads of a block run one at a time, in an order drawn from a seed, each until it waits at a
// barrier or a warp-wide operation. A barrier that is missing therefore shows as a wrong result
// under some seed, and one that not all threads reach is an error that names kernel, block and
// thread. Blocks run one after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "shared_memory.h"

namespace singd::emulation {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// 0, the default: threads in ascending order.
void set_seed(uint64_t seed);
// Blocks in an order drawn from the seed; ascending otherwise.
void set_random_blocks(bool random);

void run(const char* kernel, int64_t blocks, int threads, size_t shared_bytes,
         void (*body)(const void*), const void* data);

// Runs body() in every thread of the grid.
template <class Body>
void run(const char* kernel, int64_t blocks, int threads, size_t shared_bytes, const Body& body) {
  run(
      kernel, blocks, threads, shared_bytes,
      [](const void* data) { (*static_cast<const Body*>(data))(); }, &body);
}

// ---------------------------------------------------------------------------------------------
// What cuda.h needs.

// Where in the source an operation is written.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum class Operation {
  kSyncThreads,
  kSyncThreadsOr,
  kSyncThreadsAnd,
  kSyncThreadsCount,
  kSyncWarp,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kBallot,
  kAny,
  kAll,
};

struct Index {
  unsigned x;  // grids and blocks are one-dimensional
};

// The running thread. Hidden, since the address of a hidden variable is a constant.
struct Running {
  Index thread, block, block_dim, grid_dim;
  char* shared;
  size_t shared_bytes;
};
extern __attribute__((visibility("hidden"))) Running running;

// Throws an Error that names kernel, block and thread.
[[noreturn]] void fail(const std::string& reason);
[[noreturn]] void fail_alignment(const char* what, const void* p, size_t bytes);

// Waits for all threads of the block; returns the or, the and or the count of their predicates.
int synchronize(Operation operation, bool predicate, Site site);

// Waits for the lanes in `mask`; returns what the operation gives this lane. `argument` is a
// shuffle's lane, offset or lane mask.
uint64_t exchange(Operation operation, unsigned mask, uint64_t value, int argument, int width,
                  Site site);

// fail_alignment for an access of `bytes` at p that is not aligned to its size.
inline void check_alignment(const char* what, const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail_alignment(what, p, bytes);
}

// Whether all of the bytes at p are shared memory of the running block.
inline bool in_shared(const void* p, size_t bytes) {
  const char* q = static_cast<const char*>(p);
  const Running& r = running;
  if (q >= r.shared && q + bytes <= r.shared + r.shared_bytes) return true;
  return in_static_shared(p, bytes);
}

inline void check_shared(const char* what, const void* p, size_t bytes) {
  if (!in_shared(p, bytes)) fail(std::string(what) + " outside of the block's shared memory");
}

}  // namespace singd::emulation
