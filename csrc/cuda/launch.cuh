// The one way in which kernels are launched: on the given stream, checked, with as much dynamic
// shared memory as they ask for. Grids are one-dimensional.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "arguments.h"
#include "device.cuh"
#include "dtype.h"

namespace singd::cuda {

// What all kernels' arguments together may take (from compute capability 7.0 with CUDA 12.1).
constexpr size_t kMaxArgumentBytes = 32764;
constexpr int64_t kMaxBlocks = 2147483647;

struct Launch {
  const char* kernel;  // for messages and counts
  int64_t blocks;
  int threads;
  Stream stream;
  size_t shared_bytes = 0;  // dynamic
};

// Runs the kernel; nothing happens for 0 blocks. Throws std::runtime_error that names the kernel.
template <class... Parameters, class... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<std::decay_t<Parameters>> && ...));
  static_assert((sizeof(std::decay_t<Parameters>) + ... + 0) <= kMaxArgumentBytes);
  if (l.blocks == 0) return;
  const auto fail = [&](const std::string& reason) {
    throw std::runtime_error("kernel " + std::string(l.kernel) + " (" + std::to_string(l.blocks) +
                             " blocks of " + std::to_string(l.threads) + " threads, " +
                             std::to_string(l.shared_bytes) +
                             " bytes of shared memory): " + reason);
  };
  if (l.blocks > kMaxBlocks) fail("more blocks than a grid can have");
#if defined(SINGD_EMULATION)
  emulation::run(l.kernel, l.blocks, l.threads, l.shared_bytes,
                 [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  constexpr size_t kDefaultShared = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (l.shared_bytes > kDefaultShared) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(l.shared_bytes));
    if (error != cudaSuccess) fail(cudaGetErrorString(error));
  }
  kernel<<<static_cast<unsigned>(l.blocks), l.threads, l.shared_bytes, l.stream>>>(
      static_cast<Parameters>(arguments)...);
  error = cudaGetLastError();
  if (error != cudaSuccess) fail(cudaGetErrorString(error));
#endif
}

}  // namespace singd::cuda
