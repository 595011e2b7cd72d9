// The vocabulary of the kernels: global memory, shared memory and ordering between blocks. nvcc and
// the emulator (csrc/emulation) give every name a meaning of their own; the emulator counts what
// goes through load and store, so kernels touch global memory by no other way.
//
//   load(p), store(p, v)              one access of 1 to 16 bytes at an address aligned to its
//   size;
//                                     Cache::kStreaming marks data that is not needed again
//   prefetch(p)                       asks for the memory at p to be in L2 soon
//   discard(p)                        the 128 bytes at p, a multiple of 128, are not needed any
//   more:
//                                     L2 need not write them to memory; they are undefined then
//   copy_async(to, from, exists)      16 bytes from global to shared memory past the registers;
//                                     zeros where there is nothing to copy. They are there once ...
//   commit_copies(),                  ... the group of copies that the first call ends is not one
//   wait_for_copies<kGroups>()        of the last kGroups when the second returns; other threads
//                                     see them after a barrier
//   shared_load(p), shared_store(p, v)  the same for shared memory
//   shared_read(p)                    a structure, word by word
//   dynamic_shared<T>()               the dynamic shared memory of the block
//   max_of_halves(a, b)               of two unsigned 16-bit numbers in a word, each by itself
//   held(i)                           i, kept in a register: without it compilers compute again
//                                     for every use what is cheap to compute
//   add_release(p, v)                 atomic add on an int; writes before it are visible to ...
//   wait_for(p, v)                    ... blocks that have waited until *p >= v. Only for values
//   that
//                                     blocks with an earlier ticket provide, which never wait for
//                                     later ones (the emulator runs one block at a time)
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../structures/layout.h"

#if defined(SINGD_EMULATION)
#include "../emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace singd::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kWarp = 32;

// N values that move in one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static constexpr int kSize = N;
  T values[N];
  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

// The most elements of T that one access moves: 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

enum class Cache { kNormal, kStreaming };

#if !defined(SINGD_EMULATION)

namespace detail {

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

}  // namespace detail

template <Cache kCache = Cache::kNormal, class T>
__device__ __forceinline__ T load(const T* p) {
  using Word = typename detail::Word<sizeof(T)>::type;
  const Word* from = reinterpret_cast<const Word*>(p);
  Word word;
  if constexpr (kCache == Cache::kStreaming) {
    word = __ldcs(from);
  } else {
    word = *from;
  }
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

template <Cache kCache = Cache::kNormal, class T>
__device__ __forceinline__ void store(T* p, const T& value) {
  using Word = typename detail::Word<sizeof(T)>::type;
  Word word;
  memcpy(&word, &value, sizeof(T));
  if constexpr (kCache == Cache::kStreaming) {
    __stcs(reinterpret_cast<Word*>(p), word);
  } else {
    *reinterpret_cast<Word*>(p) = word;
  }
}

__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ void discard(void* p) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(p) : "memory");
}

template <Cache kCache = Cache::kNormal>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = exists ? 16 : 0;
  if constexpr (kCache == Cache::kStreaming) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(address),
                 "l"(from), "r"(bytes), "l"(policy)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

template <class T>
__device__ __forceinline__ T shared_load(const T* p) {
  using Word = typename detail::Word<sizeof(T)>::type;
  const Word word = *reinterpret_cast<const Word*>(p);
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

template <class T>
__device__ __forceinline__ void shared_store(T* p, const T& value) {
  using Word = typename detail::Word<sizeof(T)>::type;
  Word word;
  memcpy(&word, &value, sizeof(T));
  *reinterpret_cast<Word*>(p) = word;
}

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char singd_dynamic_shared[];
  return reinterpret_cast<T*>(singd_dynamic_shared);
}

__device__ __forceinline__ uint32_t max_of_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
__device__ __forceinline__ int held(int i) {
  asm volatile("" : "+r"(i));
  return i;
}

__device__ __forceinline__ int add_release(int* p, int value) {
  __threadfence();
  return atomicAdd(p, value);
}

__device__ __forceinline__ void wait_for(const int* p, int value) {
  while (*reinterpret_cast<const volatile int*>(p) < value) __nanosleep(64);
  __threadfence();
}

#endif  // !SINGD_EMULATION

template <class T>
__device__ __forceinline__ T shared_read(const T* p) {
  constexpr int kWords = sizeof(T) / 4;
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0);
  uint32_t words[kWords];
#pragma unroll
  for (int n = 0; n < kWords; ++n) words[n] = shared_load(reinterpret_cast<const uint32_t*>(p) + n);
  T value;
  memcpy(static_cast<void*>(&value), words, sizeof value);
  return value;
}

}  // namespace singd::cuda
