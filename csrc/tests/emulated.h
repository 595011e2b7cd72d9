// What the tests of the emulator share.
#pragma once

#include <cstdint>
#include <string>

#include "../cuda/device.cuh"
#include "../emulation/emulator.h"

namespace singd::tests {

constexpr unsigned kAll = 0xFFFFFFFFu;  // lanes

inline int thread() { return static_cast<int>(threadIdx.x); }
inline int lane() { return thread() % cuda::kWarp; }

// f(name of the seed) with the emulator at each of some seeds.
template <class Function>
void for_seeds(Function f) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    emulation::set_seed(seed);
    f("seed " + std::to_string(seed));
  }
  emulation::set_seed(0);
}

}  // namespace singd::tests
