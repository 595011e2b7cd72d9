// The emulator itself: barriers, shuffles, votes, memory, and what it finds wrong.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../cuda/launch.cuh"
#include "../cuda/numeric.cuh"
#include "../emulation/emulator.h"
#include "check.h"
#include "emulated.h"

namespace singd::cuda {

using emulation::Error;
using tests::check;
using tests::check_equal;
using tests::check_throws;
using tests::for_seeds;
using tests::kAll;
using tests::lane;
using tests::thread;

namespace {

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
  return singd::tests::failures;
}
