// Stochastic rounding to bfloat16 with a counter-based generator: the bits depend on (seed, step,
// stream, index) alone, so a run repeats bit for bit whatever the threads do. Torch-free, for host
// and device.
#pragma once

#include <cstdint>

#include "layout.h"

namespace singd {

// A well-mixed 64-bit function of its argument (the finaliser of splitmix64).
SINGD_HOST_DEVICE inline uint64_t mix_bits(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

struct RoundingKey {
  uint64_t bits = 0;
  bool enabled = false;

  SINGD_HOST_DEVICE static RoundingKey make(int64_t seed, int64_t step) {
    return {mix_bits(mix_bits(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(step)), true};
  }

  // An independent key for one tensor of the call.
  SINGD_HOST_DEVICE RoundingKey stream(uint64_t number) const {
    return {mix_bits(bits ^ number), enabled};
  }

  // The bits of `value` (a finite float32) plus 16 random ones below the last bit of bfloat16:
  // truncated, they round up with the probability that keeps the mean.
  SINGD_HOST_DEVICE uint16_t round_to_bfloat16(uint32_t value, int64_t index) const {
    const uint64_t random = mix_bits(bits ^ static_cast<uint64_t>(index));
    return static_cast<uint16_t>((value + static_cast<uint32_t>(random & 0xffff)) >> 16);
  }
};

}  // namespace singd
