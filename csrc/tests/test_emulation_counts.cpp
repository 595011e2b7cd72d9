// What the emulator counts: sectors, DRAM traffic, bank conflicts.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "../cuda/launch.cuh"
#include "../cuda/matrix.cuh"
#include "../emulation/counters.h"
#include "../emulation/emulator.h"
#include "../emulation/sector_cache.h"
#include "check.h"
#include "emulated.h"

namespace singd::cuda {

using emulation::Counters;
using tests::check_equal;
using tests::for_seeds;
using tests::lane;
using tests::thread;

namespace {

int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x) + thread(); }

// Counts of the one kernel that f launches as "counted".
template <class Function>
Counters count(Function f, int64_t l2_bytes = emulation::kDefaultL2Bytes) {
  emulation::start_counting(l2_bytes);
  f();
  return emulation::stop_counting().at("counted");
}

template <class T>
__global__ void strided_load(const T* x, int stride) {
  load(x + global_thread() * stride);
}
template <class T>
__global__ void strided_store(T* x, int stride) {
  store(x + global_thread() * stride, T{});
}

struct alignas(128) Memory {
  float values[1 << 16];
};

void test_sectors() {
  const auto memory = std::make_unique<Memory>();
  const float* x = memory->values;
  const auto strided = [&](int stride) {
    return count([&] { launch({"counted", 2, 64, nullptr}, strided_load<float>, x, stride); });
  };
  const Counters coalesced = strided(1);
  check_equal(coalesced.launches, 1, "launches");
  check_equal(coalesced.blocks, 2, "blocks");
  check_equal(coalesced.bytes_read, 128 * 4, "requested bytes");
  check_equal(coalesced.bytes_written, 0, "written bytes");
  check_equal(coalesced.bytes_by_width[2], 128 * 4, "bytes by width");
  check_equal(coalesced.sectors_read, 16, "sectors, coalesced");
  check_equal(coalesced.least_sectors_read, 16, "least sectors, coalesced");
  check_equal(strided(2).sectors_read, 32, "sectors, stride 2");
  check_equal(strided(2).least_sectors_read, 16, "least sectors, stride 2");
  check_equal(strided(32).sectors_read, 128, "sectors, stride 32");
  check_equal(strided(0).sectors_read, 4, "sectors, broadcast");
  check_equal(strided(0).least_sectors_read, 4, "least sectors, broadcast");
  using Four = Vec<float, 4>;
  const Four* four = reinterpret_cast<const Four*>(x);
  const Counters wide =
      count([&] { launch({"counted", 1, 32, nullptr}, strided_load<Four>, four, 1); });
  check_equal(wide.sectors_read, 16, "sectors, 16 bytes a lane");
  check_equal(wide.bytes_by_width[4], 512, "bytes by width, 16 bytes a lane");
}

// Lanes load different numbers of times, meet, and do so again.
template <bool kBlock>
__global__ void ragged(const float* x) {
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 1 + lane() % 2; ++i) load(x + i * 32 + lane());
    if (kBlock) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
}

void test_accesses_of_some_lanes() {
  const auto memory = std::make_unique<Memory>();
  const float* x = memory->values;
  for_seeds([&](const std::string& seed) {
    for (const auto kernel : {ragged<false>, ragged<true>}) {
      const Counters c = count([&] { launch({"counted", 1, 32, nullptr}, kernel, x); });
      check_equal(c.bytes_read, 2 * (32 + 16) * 4, "requested bytes, " + seed);
      check_equal(c.sectors_read, 2 * (4 + 4), "sectors, " + seed);
      check_equal(c.least_sectors_read, 2 * (4 + 2), "least sectors, " + seed);
    }
  });
}

template <class T>
__global__ void shared_strided(int stride) {
  T* x = dynamic_shared<T>();
  shared_store(x + lane() * stride, T{});
}

void test_bank_conflicts() {
  const auto conflicts = [](auto kernel, int stride) {
    const Counters c =
        count([&] { launch({"counted", 1, 32, nullptr, 32 * 1024}, kernel, stride); });
    check_equal(c.bytes_read + c.bytes_written, 0, "shared memory is not global");
    return std::make_pair(c.shared_phases, c.bank_conflicts);
  };
  using Pair = std::pair<int64_t, int64_t>;
  using Two = Vec<float, 2>;
  using Four = Vec<float, 4>;
  check_equal(conflicts(shared_strided<float>, 1), Pair(1, 0), "banks, stride 1");
  check_equal(conflicts(shared_strided<float>, 0), Pair(1, 0), "banks, broadcast");
  check_equal(conflicts(shared_strided<float>, 2), Pair(1, 1), "banks, stride 2");
  check_equal(conflicts(shared_strided<float>, 32), Pair(1, 31), "banks, stride 32");
  check_equal(conflicts(shared_strided<float>, 33), Pair(1, 0), "banks, stride 33");
  check_equal(conflicts(shared_strided<bfloat16>, 1), Pair(1, 0), "banks, 2 bytes a lane");
  check_equal(conflicts(shared_strided<Two>, 1), Pair(2, 0), "banks, 8 bytes a lane");
  check_equal(conflicts(shared_strided<Two>, 16), Pair(2, 30), "banks, 8 bytes, stride 16");
  check_equal(conflicts(shared_strided<Four>, 1), Pair(4, 0), "banks, 16 bytes a lane");
  check_equal(conflicts(shared_strided<Four>, 8), Pair(4, 28), "banks, 16 bytes, stride 8");
}

__global__ void load_matrix(int stride) {
  MatrixOperand<bfloat16> a;
  load_left<false>(a, dynamic_shared<bfloat16>(), stride);
}

void test_counts_of_matrices() {
  const auto loads = [](int stride) {
    return count([&] { launch({"counted", 1, 32, nullptr, 4096}, load_matrix, stride); });
  };
  check_equal(loads(64).shared_phases, 4, "phases of a matrix");
  check_equal(loads(64).bank_conflicts, 28, "banks, rows 128 bytes apart");
  check_equal(loads(72).bank_conflicts, 0, "banks, rows 144 bytes apart");
}

void test_dram() {
  const auto memory = std::make_unique<Memory>();
  const float* x = memory->values;
  float* y = memory->values;
  constexpr int64_t kBytes = 1024 * 4;
  const auto twice = [&](int64_t l2_bytes, auto kernel, auto* p, int stride) {
    return count(
        [&] {
          for (int i = 0; i < 2; ++i) launch({"counted", 8, 128, nullptr}, kernel, p, stride);
        },
        l2_bytes);
  };
  const Counters hit = twice(2 * kBytes, strided_load<float>, x, 1);
  check_equal(hit.bytes_read, 2 * kBytes, "requested bytes of two launches");
  check_equal(hit.dram_bytes_read, kBytes, "DRAM, the second read hits");
  const Counters miss = twice(kBytes / 2, strided_load<float>, x, 1);
  check_equal(miss.dram_bytes_read, 2 * kBytes, "DRAM, the second read misses");
  check_equal(miss.dram_bytes_written, 0, "DRAM, what is only read is not written");
  const Counters merged = twice(2 * kBytes, strided_store<float>, y, 1);
  check_equal(merged.dram_bytes_written, kBytes, "DRAM, two writes of a sector become one");
  check_equal(merged.dram_bytes_read, 0, "DRAM, whole sectors are written without a read");
  const Counters evicted = twice(kBytes / 2, strided_store<float>, y, 1);
  check_equal(evicted.dram_bytes_written, 2 * kBytes, "DRAM, evicted writes");
  const Counters partial = twice(16 * kBytes, strided_store<float>, y, 8);
  check_equal(partial.dram_bytes_written, 8 * kBytes, "DRAM, partly written sectors");
  check_equal(partial.dram_bytes_read, 8 * kBytes, "DRAM, partly written sectors are read");
}

void test_least_recently_used() {
  constexpr uint32_t kWhole = 0xFFFFFFFFu;
  int reads = 0, writes = 0;
  emulation::SectorCache cache(2 * emulation::kSectorBytes,
                               [&](int, bool write) { ++(write ? writes : reads); });
  const auto reads_of = [&](uint64_t sector, bool write = false) {
    const int before = reads;
    cache.access(sector, kWhole, write, false, 0);
    return reads - before;
  };
  check_equal(reads_of(1), 1, "L2, sector 1 misses");
  check_equal(reads_of(2, true), 0, "L2, sector 2 is written");
  check_equal(reads_of(1), 0, "L2, sector 1 hits");
  check_equal(reads_of(3), 1, "L2, sector 3 throws out sector 2");
  check_equal(writes, 1, "L2, sector 2 is written to DRAM");
  check_equal(reads_of(1), 0, "L2, sector 1 is still there");
  check_equal(reads_of(2), 1, "L2, sector 2 is not");
  cache.flush();
  check_equal(writes, 1, "L2, nothing is left to write");
}

void test_streaming_goes_first() {
  constexpr uint32_t kWhole = 0xFFFFFFFFu;
  int reads = 0;
  emulation::SectorCache cache(64 * emulation::kSectorBytes,  // 62 sectors to keep, 2 for streams
                               [&](int, bool write) { reads += write ? 0 : 1; });
  const auto reads_of = [&](uint64_t first, uint64_t count, bool streaming) {
    const int before = reads;
    for (uint64_t sector = first; sector < first + count; ++sector) {
      cache.access(sector, kWhole, false, streaming, 0);
    }
    return reads - before;
  };
  check_equal(reads_of(0, 62, false), 62, "streaming, what is to be kept misses once");
  check_equal(reads_of(100, 500, true), 500, "streaming, a stream misses");
  check_equal(reads_of(598, 2, true), 0, "streaming, its last sectors are there");
  check_equal(reads_of(0, 62, false), 0, "streaming, a stream throws out nothing else");
  check_equal(reads_of(0, 1, true), 0, "streaming, the last use of a sector hits");
  check_equal(reads_of(700, 2, true), 2, "streaming, others follow");
  check_equal(reads_of(0, 1, false), 1, "streaming, after its last use it goes first");
}

__global__ void add_up(int* p) { atomicAdd(p, 1); }

void test_atomics() {
  int sum = 0;
  const Counters c = count([&] { launch({"counted", 2, 64, nullptr}, add_up, &sum); });
  check_equal(sum, 128, "atomicAdd");
  check_equal(c.atomics, 128, "counted atomics");
  check_equal(c.sectors_read + c.sectors_written, 8, "sectors of atomics");
}

}  // namespace

}  // namespace singd::cuda

int main() {
  using namespace singd::cuda;
  test_sectors();
  test_accesses_of_some_lanes();
  test_bank_conflicts();
  test_counts_of_matrices();
  test_dram();
  test_least_recently_used();
  test_streaming_goes_first();
  test_atomics();
  return singd::tests::failures;
}
