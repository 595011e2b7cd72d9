// CUDA C++ for the host: what csrc/cuda/device.cuh takes from the toolkit's headers and defines for
// nvcc, here on top of the emulator. Kernels are ordinary functions; number formats come from the
// toolkit's own headers, which are exact on the host too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <string.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstdint>
#include <type_traits>

#include "async_copies.h"
#include "counters.h"
#include "emulator.h"

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
// Thread-local, since that tells shared memory from other static variables (shared_memory.h).
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::singd::emulation::running.thread)
#define blockIdx (::singd::emulation::running.block)
#define blockDim (::singd::emulation::running.block_dim)
#define gridDim (::singd::emulation::running.grid_dim)

#define SINGD_SITE ::singd::emulation::Site site = ::singd::emulation::Site::here()

// Barriers.

inline void __syncthreads(SINGD_SITE) {
  singd::emulation::synchronize(singd::emulation::Operation::kSyncThreads, false, site);
}
inline int __syncthreads_or(int predicate, SINGD_SITE) {
  return singd::emulation::synchronize(singd::emulation::Operation::kSyncThreadsOr, predicate != 0,
                                       site);
}
inline int __syncthreads_and(int predicate, SINGD_SITE) {
  return singd::emulation::synchronize(singd::emulation::Operation::kSyncThreadsAnd, predicate != 0,
                                       site);
}
inline int __syncthreads_count(int predicate, SINGD_SITE) {
  return singd::emulation::synchronize(singd::emulation::Operation::kSyncThreadsCount,
                                       predicate != 0, site);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, SINGD_SITE) {
  singd::emulation::exchange(singd::emulation::Operation::kSyncWarp, mask, 0, 0, 32, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Shuffles and votes.

namespace singd::emulation {

template <class T>
T shuffle(Operation operation, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(operation, mask, bits, argument, width, site);
  memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}

}  // namespace singd::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SINGD_SITE) {
  return singd::emulation::shuffle(singd::emulation::Operation::kShuffle, mask, value, lane, width,
                                   site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SINGD_SITE) {
  return singd::emulation::shuffle(singd::emulation::Operation::kShuffleXor, mask, value, lanes,
                                   width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset, int width = 32, SINGD_SITE) {
  return singd::emulation::shuffle(singd::emulation::Operation::kShuffleUp, mask, value,
                                   static_cast<int>(offset), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = 32, SINGD_SITE) {
  return singd::emulation::shuffle(singd::emulation::Operation::kShuffleDown, mask, value,
                                   static_cast<int>(offset), width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SINGD_SITE) {
  return static_cast<unsigned>(singd::emulation::exchange(singd::emulation::Operation::kBallot,
                                                          mask, predicate != 0, 0, 32, site));
}
inline int __any_sync(unsigned mask, int predicate, SINGD_SITE) {
  return static_cast<int>(singd::emulation::exchange(singd::emulation::Operation::kAny, mask,
                                                     predicate != 0, 0, 32, site));
}
inline int __all_sync(unsigned mask, int predicate, SINGD_SITE) {
  return static_cast<int>(singd::emulation::exchange(singd::emulation::Operation::kAll, mask,
                                                     predicate != 0, 0, 32, site));
}

#undef SINGD_SITE

// Atomics on integers; those on floating-point numbers are absent, since their order is not
// repeatable.

namespace singd::emulation {

template <class T, class Function>
__forceinline__ T atomic(T* p, Function change) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                std::is_same_v<T, unsigned long long>);
  check_alignment("atomic access", p, sizeof(T));
  if (counting) count_atomic(p, sizeof(T));
  const T old = *p;
  *p = change(old);
  return old;
}

template <class T>
using Same = std::common_type_t<T>;  // not deduced

}  // namespace singd::emulation

template <class T>
__forceinline__ T atomicAdd(T* p, singd::emulation::Same<T> value) {
  return singd::emulation::atomic(p, [&](T old) { return old + value; });
}
template <class T>
__forceinline__ T atomicOr(T* p, singd::emulation::Same<T> value) {
  return singd::emulation::atomic(p, [&](T old) { return old | value; });
}
template <class T>
__forceinline__ T atomicMax(T* p, singd::emulation::Same<T> value) {
  return singd::emulation::atomic(p, [&](T old) { return old > value ? old : value; });
}

// Arithmetic that is not in the host's math.h. As CUDA's, min and max of floating-point numbers
// prefer a number to NaN.

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

#define SINGD_REINTERPRET(name, To, From)             \
  inline To name(From x) {                            \
    static_assert(sizeof(To) == sizeof(From), #name); \
    To y;                                             \
    memcpy(&y, &x, sizeof y);                         \
    return y;                                         \
  }
SINGD_REINTERPRET(__float_as_int, int, float)
SINGD_REINTERPRET(__float_as_uint, unsigned, float)
SINGD_REINTERPRET(__int_as_float, float, int)
SINGD_REINTERPRET(__uint_as_float, float, unsigned)
SINGD_REINTERPRET(__double_as_longlong, long long, double)
SINGD_REINTERPRET(__longlong_as_double, double, long long)
#undef SINGD_REINTERPRET

// The vocabulary of csrc/cuda/device.cuh.
namespace singd::cuda {

enum class Cache;  // defined there; 0 is kNormal

template <Cache kCache>
constexpr bool kStreaming = kCache != Cache{};

template <class T>
constexpr bool kIsAccess = std::is_trivially_copyable_v<T> &&
                           (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

template <Cache kCache = Cache{}, class T>
__forceinline__ T load(const T* p) {
  static_assert(kIsAccess<T>);
  emulation::check_alignment("load", p, sizeof(T));
  if (emulation::counting) emulation::count_load(p, sizeof(T), kStreaming<kCache>);
  T value;
  memcpy(static_cast<void*>(&value), p, sizeof value);
  return value;
}

template <Cache kCache = Cache{}, class T>
__forceinline__ void store(T* p, const T& value) {
  static_assert(kIsAccess<T>);
  emulation::check_alignment("store", p, sizeof(T));
  if (emulation::counting) emulation::count_store(p, sizeof(T), kStreaming<kCache>);
  memcpy(static_cast<void*>(p), &value, sizeof value);
}

inline void prefetch(const void*) {}

inline void discard(void* p) {
  constexpr size_t kBytes = 128;
  emulation::check_alignment("discard", p, kBytes);
  if (emulation::counting) emulation::count_discard(p, kBytes);
  memset(p, 0xFF, kBytes);
}

template <Cache kCache = Cache{}>
__forceinline__ void copy_async(void* to, const void* from, bool exists) {
  emulation::check_alignment("copy_async", to, emulation::kCopyBytes);
  emulation::check_shared("copy_async", to, emulation::kCopyBytes);
  if (exists) emulation::check_alignment("copy_async", from, emulation::kCopyBytes);
  if (emulation::counting) {
    if (exists) emulation::count_load(from, emulation::kCopyBytes, kStreaming<kCache>);
    emulation::count_shared(to, emulation::kCopyBytes);
  }
  emulation::begin_copy(to, exists ? from : nullptr);
}

inline void commit_copies() { emulation::commit_copies(); }

template <int kGroups>
void wait_for_copies() {
  emulation::land_copies(kGroups);
}

template <class T>
__forceinline__ T shared_load(const T* p) {
  static_assert(kIsAccess<T>);
  emulation::check_alignment("shared_load", p, sizeof(T));
  emulation::check_shared("shared_load", p, sizeof(T));
  if (emulation::counting) emulation::count_shared(p, sizeof(T));
  T value;
  memcpy(static_cast<void*>(&value), p, sizeof value);
  return value;
}

template <class T>
__forceinline__ void shared_store(T* p, const T& value) {
  static_assert(kIsAccess<T>);
  emulation::check_alignment("shared_store", p, sizeof(T));
  emulation::check_shared("shared_store", p, sizeof(T));
  if (emulation::counting) emulation::count_shared(p, sizeof(T));
  memcpy(static_cast<void*>(p), &value, sizeof value);
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::running.shared);
}

__forceinline__ uint32_t max_of_halves(uint32_t a, uint32_t b) {
  return max(a & 0xffff0000u, b & 0xffff0000u) | max(a & 0xffffu, b & 0xffffu);
}
inline int held(int i) { return i; }

__forceinline__ int add_release(int* p, int value) { return atomicAdd(p, value); }

inline void wait_for(const int* p, int value) {
  if (emulation::counting) emulation::count_load(p, sizeof *p);
  if (*p >= value) return;
  emulation::fail("it would wait for ever: an int is " + std::to_string(*p) + " and not yet " +
                  std::to_string(value));
}

}  // namespace singd::cuda
