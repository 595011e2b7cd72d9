// What csrc/cpu's torch-free work takes from ATen's threads: here there is one.
#pragma once

#include <cstdint>

namespace at {

template <class Function>
void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/, const Function& f) {
  if (begin < end) f(begin, end);
}

inline int get_num_threads() { return 1; }
inline int get_thread_num() { return 0; }

}  // namespace at
