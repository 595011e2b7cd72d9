// Memory that calls keep from one to the next.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace singd {

// Gives memory so many bytes, or none if there are not so many: a tensor whose resize_ failed says
// that it had its new size.
inline void resize_memory(at::Tensor& memory, int64_t bytes) {
  try {
    memory.resize_({bytes});
  } catch (...) {
    memory.resize_({0});
    throw;
  }
}

}  // namespace singd
