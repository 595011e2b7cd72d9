// Memory of one thread that outlives a call, for scratch that fits a cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace singd::cpu {

// At least `count` numbers, aligned to whole vectors; what an earlier call left there is garbage.
// Each Use has memory of its own.
template <class T, class Use = void>
T* thread_scratch(int64_t count) {
  constexpr std::size_t kAlignment = 64;
  thread_local std::unique_ptr<std::byte[]> memory;
  thread_local std::size_t capacity = 0;
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T) + kAlignment;
  if (bytes > capacity) {
    memory.reset(new std::byte[bytes]);
    capacity = bytes;
  }
  void* start = memory.get();
  std::size_t space = capacity;
  return static_cast<T*>(std::align(kAlignment, bytes - kAlignment, start, space));
}

}  // namespace singd::cpu
