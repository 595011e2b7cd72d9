// Counts of what kernels do to memory, while counting is on. An access of a warp is what its lanes
// request at one place of the code; what it costs depends on the lanes' addresses:
//   global memory   moves sectors of 32 bytes between L2 and the lanes
//   shared memory   serves 32 banks of 4 bytes at a time; 8 and 16 bytes a lane take 2 and 4 phases
//   DRAM            is what an L2 of given size with the least recently used sectors thrown out
//                   reads and writes (sector_cache.h); L1 is left out
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace singd::emulation {

constexpr int kWidths = 5;  // accesses of 1, 2, 4, 8 and 16 bytes a lane

struct Counters {
  int64_t launches = 0;
  int64_t blocks = 0;
  // Global memory: what lanes request, the sectors that this moves, and the fewest sectors that
  // could hold it.
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  int64_t sectors_read = 0;
  int64_t sectors_written = 0;
  int64_t least_sectors_read = 0;
  int64_t least_sectors_written = 0;
  int64_t bytes_by_width[kWidths] = {};  // the requested bytes by the bytes a lane
  int64_t atomics = 0;                   // by lane
  int64_t dram_bytes_read = 0;
  int64_t dram_bytes_written = 0;
  // Shared memory: phases of a warp's accesses, and turns beyond one a phase.
  int64_t shared_phases = 0;
  int64_t bank_conflicts = 0;

  Counters& operator+=(const Counters& other);
};

constexpr int64_t kDefaultL2Bytes = int64_t{32} << 20;

void start_counting(int64_t l2_bytes = kDefaultL2Bytes);
// What was counted, by kernel. Written sectors that are still in L2 are written to DRAM first.
std::map<std::string, Counters> stop_counting();

// ---------------------------------------------------------------------------------------------
// What the emulator and cuda.h need.

extern __attribute__((visibility("hidden"))) bool counting;

// To be called from inlined code: the return address tells one place of a kernel from another.
void count_load(const void* p, size_t bytes, bool streaming = false);
void count_store(const void* p, size_t bytes, bool streaming = false);
void count_atomic(const void* p, size_t bytes);
void count_shared(const void* p, size_t bytes);
// What L2 holds of the bytes is never written to DRAM.
void count_discard(const void* p, size_t bytes);
// A warp loads 16 rows of 32 bytes from shared memory.
void count_matrix(const void* p, size_t stride_bytes);

void count_launch(const char* kernel, int64_t blocks, int threads);
// All lanes of the warp have come to the same place: accesses before and after it are distinct.
void count_converged(int warp);
void count_block_converged();

}  // namespace singd::emulation
