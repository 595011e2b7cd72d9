// float32 on the tensor cores: a number is split exactly into planes of bfloat16 that add up to it,
// three for float32, two for float16, one for bfloat16. A product of two numbers is the sum of the
// products of their planes p and q, of which those with p + q >= kComputePlanes are left out: for
// float32 what is below 2^-24 of it, for 16-bit numbers what is below 2^-16.
#pragma once

#include "matrix.cuh"
#include "numeric.cuh"

namespace singd::cuda {

// Planes that hold a stored number exactly, and those of factors and intermediate sums beside it.
template <class Stored>
constexpr int kStoredPlanes = sizeof(Stored) == 4                ? 3
                              : std::is_same_v<Stored, bfloat16> ? 1
                                                                 : 2;
template <class Stored>
constexpr int kComputePlanes = sizeof(Stored) == 4 ? 3 : 2;

template <int kPlanes>
__device__ __forceinline__ void split(float value, bfloat16 (&planes)[kPlanes]) {
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    planes[p] = narrow<bfloat16>(value);
    value -= widen<float>(planes[p]);
  }
}

// A bfloat16 is the upper half of a float.
__device__ __forceinline__ float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Two numbers at a time.
template <int kPlanes>
__device__ __forceinline__ void split_pair(float low, float high,
                                           Vec<bfloat16, 2> (&planes)[kPlanes]) {
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    planes[p] = narrow_pair<bfloat16>(low, high);
    uint32_t word;
    memcpy(&word, &planes[p], sizeof word);
    low -= from_bits(word << 16);
    high -= from_bits(word & 0xffff0000U);
  }
}

// The planes of an operand whose elements the lanes hold in the order of matrix.cuh.
template <int kPlanes>
__device__ __forceinline__ void split(const float (&values)[8],
                                      MatrixOperand<bfloat16> (&operands)[kPlanes]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    Vec<bfloat16, 2> pairs[kPlanes];
    split_pair(values[2 * w], values[2 * w + 1], pairs);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) memcpy(&operands[p].words[w], &pairs[p], sizeof pairs[p]);
  }
}

}  // namespace singd::cuda
