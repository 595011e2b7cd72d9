// The emulator itself: barriers, shuffles, votes, memory, wmma, what it finds wrong and what it
// counts.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "../cuda/launch.cuh"
#include "../cuda/numeric.cuh"
#include "../emulation/counters.h"
#include "../emulation/emulator.h"
#include "../emulation/sector_cache.h"
#include "check.h"

namespace singd::cuda {

using emulation::Counters;
using emulation::Error;
using tests::check;
using tests::check_close;
using tests::check_equal;
using tests::check_throws;

namespace {

constexpr int kSeeds = 12;
constexpr unsigned kAll = 0xFFFFFFFFu;

int thread() { return static_cast<int>(threadIdx.x); }
int lane() { return thread() % kWarp; }
int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x) + thread(); }

template <class Function>
void for_seeds(Function f) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulation::set_seed(static_cast<uint64_t>(seed));
    f("seed " + std::to_string(seed));
  }
  emulation::set_seed(0);
}

// Counts of the one kernel that f launches as "counted".
template <class Function>
Counters count(Function f, int64_t l2_bytes = emulation::kDefaultL2Bytes) {
  emulation::start_counting(l2_bytes);
  f();
  return emulation::stop_counting().at("counted");
}

// ---------------------------------------------------------------------------------------------
// Barriers.

// Reverses each group of 256, four groups a block, through one tile.
template <bool kSecondBarrier>
__global__ void __launch_bounds__(256) reverse(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float tile[256];
  for (int group = 0; group < 4; ++group) {
    const int64_t base = (blockIdx.x * 4 + group) * 256;
    shared_store(tile + threadIdx.x, load<Cache::kStreaming>(x + base + threadIdx.x));
    __syncthreads();
    store(y + base + threadIdx.x, shared_load(tile + 255 - threadIdx.x));
    if (kSecondBarrier) __syncthreads();
  }
}

template <bool kSecondBarrier>
bool reverses() {
  std::vector<float> x(4096), y(4096);
  std::iota(x.begin(), x.end(), 0.0f);
  launch({"reverse", 4, 256, nullptr}, reverse<kSecondBarrier>, x.data(), y.data());
  for (int i = 0; i < 4096; ++i) {
    if (y[static_cast<size_t>(i)] != static_cast<float>(i / 256 * 256 + 255 - i % 256))
      return false;
  }
  return true;
}

void test_barriers() {
  for_seeds([](const std::string& seed) {
    check(reverses<true>(), "reverse, " + seed);
    check(!reverses<false>(), "a missing barrier shows, " + seed);
  });
}

// A sum that forgets the barrier between the warps' sums and the first warp's use of them.
template <bool kBarrier>
__global__ void block_sum(const int* x, int* y) {
  __shared__ int sums[4];
  int value = load(x + threadIdx.x);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(kAll, value, static_cast<unsigned>(offset));
  }
  if (lane() == 0) shared_store(sums + thread() / kWarp, value);
  if (kBarrier) __syncthreads();
  if (thread() == 0) {
    store(y, shared_load(sums) + shared_load(sums + 1) + shared_load(sums + 2) +
                 shared_load(sums + 3));
  }
}

void test_missing_barrier_of_some_seed() {
  std::vector<int> x(128, 1);
  int found = 0;
  for_seeds([&](const std::string& seed) {
    int y = 0;
    launch({"block_sum", 1, 128, nullptr}, block_sum<true>, x.data(), &y);
    check_equal(y, 128, "block_sum, " + seed);
    launch({"block_sum", 1, 128, nullptr}, block_sum<false>, x.data(), &y);
    found += y != 128;
  });
  check(found > 0, "some seed finds the missing barrier of block_sum");
}

// The second warp reads what the first one writes, only later than it, without a barrier.
__global__ void late_reader(int* y) {
  __shared__ int value;
  const bool writes = thread() < kWarp;
  for (int i = 0; i < (writes ? 1 : 4); ++i) __syncwarp();
  if (thread() == 0) shared_store(&value, 7);
  if (thread() == kWarp) store(y, shared_load(&value));
}

void test_warp_far_ahead() {
  int found = 0;
  for_seeds([&](const std::string&) {
    int y = 0;
    int* p = &y;
    launch({"late_reader", 1, 64, nullptr}, late_reader, p);
    found += y != 7;
  });
  check(found > 0, "some seed lets the second warp run ahead of the first");
}

__global__ void count_votes(int limit, int* y) {
  const int i = thread() * 3;
  store(y + i, __syncthreads_count(thread() < limit));
  store(y + i + 1, __syncthreads_or(thread() < limit));
  store(y + i + 2, __syncthreads_and(thread() < limit));
}

void test_barrier_votes() {
  for_seeds([](const std::string& seed) {
    for (const int limit : {0, 37, 64}) {
      std::vector<int> y(64 * 3, -1);
      launch({"count_votes", 1, 64, nullptr}, count_votes, limit, y.data());
      for (size_t i = 0; i < 64; ++i) {
        check_equal(y[3 * i], limit, "__syncthreads_count, " + seed);
        check_equal(y[3 * i + 1] != 0, limit > 0, "__syncthreads_or, " + seed);
        check_equal(y[3 * i + 2] != 0, limit == 64, "__syncthreads_and, " + seed);
      }
    }
  });
}

__global__ void different_barriers() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void ends_early(int count) {
  if (thread() >= count) return;
  __syncthreads();
}
__global__ void incomplete_warp() {
  if (lane() != 5) __syncwarp();
}
__global__ void different_shuffles() {
  if (lane() < 16) {
    __shfl_sync(kAll, 1.0f, 0);
  } else {
    __shfl_xor_sync(kAll, 1.0f, 1);
  }
}
__global__ void foreign_mask() { __syncwarp(1u); }
__global__ void waits(const int* p) { wait_for(p, 3); }

void test_divergence() {
  const auto fails = [](void (*kernel)(), const std::string& text) {
    for_seeds([&](const std::string& seed) {
      check_throws<Error>([&] { launch({"diverges", 1, 64, nullptr}, kernel); }, text, seed);
    });
  };
  fails(different_barriers, "waits in __syncthreads (");
  fails(incomplete_warp, "kernel diverges, block 0: thread 0 waits in __syncwarp (");
  fails(different_shuffles, "waits in __shfl_xor_sync (");
  fails(foreign_mask, "mask lacks this lane");
  check_throws<Error>([] { launch({"ends", 3, 64, nullptr}, ends_early, 40); },
                      "for ever; thread 40 has ended", "threads that end before a barrier");
  const int two = 2;
  check_throws<Error>([&] { launch({"waits", 1, 1, nullptr}, waits, &two); },
                      "kernel waits, block 0, thread 0: it would wait for ever", "wait_for");
  check(reverses<true>(), "a launch after errors");
}

// ---------------------------------------------------------------------------------------------
// Warps.

__global__ void shuffles(int* y) {
  int* mine = y + thread() * 8;
  const int value = 100 + lane();
  store(mine + 0, __shfl_sync(kAll, value, 3));
  store(mine + 1, __shfl_sync(kAll, value, lane() + 1, 8));
  store(mine + 2, __shfl_xor_sync(kAll, value, 5));
  store(mine + 3, __shfl_up_sync(kAll, value, 2));
  store(mine + 4, __shfl_up_sync(kAll, value, 3, 16));
  store(mine + 5, __shfl_down_sync(kAll, value, 30));
  store(mine + 6, static_cast<int>(__shfl_down_sync(kAll, static_cast<double>(value), 1, 4)));
  store(mine + 7, static_cast<int>(widen<float>(__shfl_xor_sync(kAll, bfloat16(3.0f), 1))));
}

void test_shuffles() {
  for_seeds([](const std::string& seed) {
    std::vector<int> y(64 * 8, -1);
    launch({"shuffles", 1, 64, nullptr}, shuffles, y.data());
    for (int i = 0; i < 64; ++i) {
      const int l = i % 32;
      const int expected[] = {103,
                              100 + (l / 8 * 8 + (l + 1) % 8),
                              100 + (l ^ 5),
                              l < 2 ? 100 + l : 98 + l,
                              l % 16 < 3 ? 100 + l : 97 + l,
                              l < 2 ? 130 + l : 100 + l,
                              l % 4 == 3 ? 100 + l : 101 + l,
                              3};
      for (int k = 0; k < 8; ++k) {
        check_equal(y[static_cast<size_t>(i * 8 + k)], expected[k],
                    "shuffle " + std::to_string(k) + " of lane " + std::to_string(l) + ", " + seed);
      }
    }
  });
}

// The halves of a warp shuffle and vote on their own, a different number of times.
__global__ void halves(int* y) {
  const unsigned mask = lane() < 16 ? 0xFFFFu : 0xFFFF0000u;
  int value = lane();
  for (int i = 0; i < (lane() < 16 ? 1 : 3); ++i) value += __shfl_xor_sync(mask, value, 1);
  const int any = __any_sync(mask, lane() == 3);
  const int all = __all_sync(mask, lane() >= 16);
  const unsigned ballot = __ballot_sync(kAll, lane() % 2 == 0);
  store(y + thread() * 4 + 0, value);
  store(y + thread() * 4 + 1, any);
  store(y + thread() * 4 + 2, all);
  store(y + thread() * 4 + 3, static_cast<int>(ballot));
}

void test_votes_of_half_warps() {
  for_seeds([](const std::string& seed) {
    std::vector<int> y(32 * 4);
    launch({"halves", 1, 32, nullptr}, halves, y.data());
    for (int l = 0; l < 32; ++l) {
      const int pair = l / 2 * 4 + 1;
      const int* mine = y.data() + l * 4;
      check_equal(mine[0], l < 16 ? pair : 4 * pair, "sums of a half warp, " + seed);
      check_equal(mine[1] != 0, l < 16, "__any_sync, " + seed);
      check_equal(mine[2] != 0, l >= 16, "__all_sync, " + seed);
      check_equal(static_cast<unsigned>(mine[3]), 0x55555555u, "__ballot_sync, " + seed);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Memory.

__global__ void read_shared(float* y) {
  __shared__ float fixed[4];
  float* dynamic = dynamic_shared<float>();
  store(y, shared_load(fixed + 3));
  store(y + 1, shared_load(dynamic + 3));
  shared_store(fixed + 3, 1.0f);
  shared_store(dynamic + 3, 1.0f);
}

void test_shared_memory_is_poisoned() {
  float y[2] = {};
  float* p = y;
  check(emulation::static_shared_bytes() >= 16, "static shared memory is found");
  for (int i = 0; i < 2; ++i) {
    launch({"read_shared", 2, 1, nullptr, 16}, read_shared, p);
    check(std::isnan(y[0]), "static shared memory is not set");
    check(std::isnan(y[1]), "dynamic shared memory is not set");
  }
}

template <class T>
__global__ void load_one(const T* p) {
  load(p);
}
template <class T>
__global__ void store_one(T* p) {
  store(p, T{});
}
__global__ void load_beyond(int index) { shared_load(dynamic_shared<float>() + index); }

void test_bad_addresses() {
  alignas(16) char memory[32] = {};
  check_throws<Error>(
      [&] { launch({"k", 1, 1, nullptr}, load_one<int>, reinterpret_cast<int*>(memory + 2)); },
      "kernel k, block 0, thread 0: load of 4 bytes at an address that is 2 modulo 4", "load");
  using Four = Vec<float, 4>;
  check_throws<Error>(
      [&] { launch({"k", 1, 1, nullptr}, store_one<Four>, reinterpret_cast<Four*>(memory + 8)); },
      "store of 16 bytes", "store");
  launch({"k", 1, 1, nullptr, 32}, load_beyond, 7);
  check_throws<Error>([] { launch({"k", 1, 1, nullptr, 32}, load_beyond, 8); },
                      "outside of the block's shared memory", "shared_load");
  check_throws<Error>([] { launch({"k", 1, 1, nullptr, 170000}, load_beyond, 0); },
                      "more than every GPU has", "too much shared memory");
}

// Blocks take tickets; the block of each ticket waits for the one before.
__global__ void chain(int* ticket, int* done, int* order) {
  __shared__ int mine;
  if (threadIdx.x == 0) mine = atomicAdd(ticket, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    wait_for(done, mine);
    store(order + mine, static_cast<int>(blockIdx.x));
    add_release(done, 1);
  }
}

void test_block_order() {
  const auto order_of = [] {
    int ticket = 0, done = 0;
    std::vector<int> order(64);
    launch({"chain", 64, 32, nullptr}, chain, &ticket, &done, order.data());
    return order;
  };
  std::vector<int> ascending(64);
  std::iota(ascending.begin(), ascending.end(), 0);
  check_equal(order_of(), ascending, "blocks in order");
  emulation::set_random_blocks(true);
  emulation::set_seed(1);
  std::vector<int> order = order_of();
  check(order != ascending, "blocks in random order");
  emulation::set_seed(1);
  check_equal(order_of(), order, "a seed gives one order");
  std::sort(order.begin(), order.end());
  check_equal(order, ascending, "every block runs once");
  emulation::set_random_blocks(false);
  emulation::set_seed(0);
}

// ---------------------------------------------------------------------------------------------
// wmma.

// y = x x^T for x of 16 x `columns`; the halves of a warp fill and read the tile.
template <class T, bool kSync>
__global__ void gram(const T* x, int columns, float* y) {
  namespace wmma = nvcuda::wmma;
  __shared__ __align__(32) T tile[16 * 24];
  __shared__ __align__(32) float result[16 * 20];
  wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(sum, 0.0f);
  for (int first = 0; first < columns; first += 16) {
    for (int i = lane(); i < 256; i += kWarp) {
      shared_store(tile + i / 16 * 24 + i % 16, load(x + i / 16 * columns + first + i % 16));
    }
    __syncwarp();
    wmma::load_matrix_sync(a, tile, 24);
    wmma::load_matrix_sync(b, tile, 24);
    if (kSync) __syncwarp();
    wmma::mma_sync(sum, a, b, sum);
  }
  wmma::store_matrix_sync(result, sum, 20, wmma::mem_row_major);
  __syncwarp();
  for (int i = lane(); i < 256; i += kWarp) {
    store(y + i, shared_load(result + i / 16 * 20 + i % 16));
  }
}

template <class T, bool kSync>
double gram_error() {
  constexpr int kColumns = 64;
  std::vector<T> x(16 * kColumns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = T(0.37f * static_cast<float>(i * 7 % 23) - 3.0f);
  std::vector<float> y(256);
  launch({"gram", 1, 32, nullptr}, gram<T, kSync>, x.data(), kColumns, y.data());
  double error = 0;
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 16; ++j) {
      double sum = 0;
      for (size_t k = 0; k < kColumns; ++k) {
        sum += static_cast<double>(widen<float>(x[i * kColumns + k])) *
               static_cast<double>(widen<float>(x[j * kColumns + k]));
      }
      const double difference = std::abs(sum - static_cast<double>(y[i * 16 + j]));
      error = difference <= error ? error : difference;  // NaN is an error
    }
  }
  return error;
}

void test_wmma() {
  int found = 0;
  for_seeds([&](const std::string& seed) {
    check_close(gram_error<bfloat16, true>(), 0, 1e-3, "wmma, bfloat16, " + seed);
    check_close(gram_error<float16, true>(), 0, 1e-3, "wmma, float16, " + seed);
    found += !(gram_error<bfloat16, false>() < 1e-3);
  });
  check(found > 0, "some seed finds the missing __syncwarp");
}

enum class Mistake { kPointer, kRows, kEmpty, kSomeLanes };

__global__ void mistaken_wmma(Mistake mistake) {
  namespace wmma = nvcuda::wmma;
  bfloat16* tile = dynamic_shared<bfloat16>();
  wmma::fragment<wmma::matrix_a, 16, 16, 16, bfloat16, wmma::row_major> a;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  if (mistake == Mistake::kPointer) wmma::load_matrix_sync(a, tile + 8, 16);
  if (mistake == Mistake::kRows) wmma::load_matrix_sync(a, tile, 20);
  if (mistake == Mistake::kEmpty) {
    wmma::store_matrix_sync(dynamic_shared<float>(), sum, 16, wmma::mem_row_major);
  }
  if (mistake == Mistake::kSomeLanes && lane() < 7) wmma::load_matrix_sync(a, tile, 16);
}

void test_mistaken_wmma() {
  const auto fails = [](Mistake mistake, const std::string& text) {
    check_throws<Error>([&] { launch({"wmma", 1, 32, nullptr, 1024}, mistaken_wmma, mistake); },
                        text, "wmma");
  };
  fails(Mistake::kPointer, "not a multiple of 32 bytes");
  fails(Mistake::kRows, "not a multiple of 16 bytes");
  fails(Mistake::kEmpty, "before it is filled");
  fails(Mistake::kSomeLanes, "thread 7 made 0 calls of wmma, lane 0 of its warp 1");
}

// ---------------------------------------------------------------------------------------------
// Counts.

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

__global__ void load_matrix(const bfloat16* global, int ldm) {
  namespace wmma = nvcuda::wmma;
  wmma::fragment<wmma::matrix_a, 16, 16, 16, bfloat16, wmma::row_major> a;
  const bfloat16* p = global == nullptr ? dynamic_shared<bfloat16>() : global;
  wmma::load_matrix_sync(a, p, static_cast<unsigned>(ldm));
}

void test_counts_of_wmma() {
  const auto memory = std::make_unique<Memory>();
  const bfloat16* x = reinterpret_cast<const bfloat16*>(memory->values);
  const auto loads = [](const bfloat16* p, int ldm) {
    return count([&] { launch({"counted", 1, 32, nullptr, 4096}, load_matrix, p, ldm); });
  };
  check_equal(loads(x, 16).sectors_read, 16, "sectors of a matrix");
  check_equal(loads(x, 72).sectors_read, 24, "sectors of a matrix with rows 144 bytes apart");
  check_equal(loads(nullptr, 64).shared_phases, 4, "phases of a matrix");
  check_equal(loads(nullptr, 64).bank_conflicts, 28, "banks, rows 128 bytes apart");
  check_equal(loads(nullptr, 72).bank_conflicts, 0, "banks, rows 144 bytes apart");
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
  const Counters hit = twice(kBytes, strided_load<float>, x, 1);
  check_equal(hit.bytes_read, 2 * kBytes, "requested bytes of two launches");
  check_equal(hit.dram_bytes_read, kBytes, "DRAM, the second read hits");
  const Counters miss = twice(kBytes / 2, strided_load<float>, x, 1);
  check_equal(miss.dram_bytes_read, 2 * kBytes, "DRAM, the second read misses");
  check_equal(miss.dram_bytes_written, 0, "DRAM, what is only read is not written");
  const Counters merged = twice(kBytes, strided_store<float>, y, 1);
  check_equal(merged.dram_bytes_written, kBytes, "DRAM, two writes of a sector become one");
  check_equal(merged.dram_bytes_read, 0, "DRAM, whole sectors are written without a read");
  const Counters evicted = twice(kBytes / 2, strided_store<float>, y, 1);
  check_equal(evicted.dram_bytes_written, 2 * kBytes, "DRAM, evicted writes");
  const Counters partial = twice(8 * kBytes, strided_store<float>, y, 8);
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
    cache.access(sector, kWhole, write, 0);
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
  test_barriers();
  test_missing_barrier_of_some_seed();
  test_warp_far_ahead();
  test_barrier_votes();
  test_divergence();
  test_shuffles();
  test_votes_of_half_warps();
  test_shared_memory_is_poisoned();
  test_bad_addresses();
  test_block_order();
  test_wmma();
  test_mistaken_wmma();
  test_sectors();
  test_accesses_of_some_lanes();
  test_bank_conflicts();
  test_counts_of_wmma();
  test_dram();
  test_least_recently_used();
  test_atomics();
  return singd::tests::failures;
}
