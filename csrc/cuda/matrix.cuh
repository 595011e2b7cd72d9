// Products of 16 x 16 matrices on the tensor cores, as the instructions ldmatrix and mma do them:
//
//   C[i, j] += sum over k of A[i, k] B[k, j]
//
// for A and B of bfloat16 or float16 and C of float. All lanes of a warp take part in every call.
// Lane l = 4 q + p (p < 4) holds eight elements of each:
//
//   C   values[e]           C[q + 8 (e / 2 % 2), 2 p + e % 2 + 8 (e / 4)]
//   A   word w, half h      A[q + 8 (w % 2), 2 p + h + 8 (w / 2)]
//   B   word w, half h      B[2 p + h + 8 (w % 2), q + 8 (w / 2)]
//
// So the values of C, rounded, are those of an A: word w of it holds values 2 w and 2 w + 1.
#pragma once

#include "device.cuh"

namespace singd::cuda {

constexpr int kMatrix = 16;  // rows and columns

template <class T>
struct MatrixOperand {
  uint32_t words[4];
};

struct MatrixSums {
  float values[8] = {};
};

// Where value e of a lane lies in C.
SINGD_HOST_DEVICE constexpr int matrix_row(int lane, int e) { return lane / 4 + e / 2 % 2 * 8; }
SINGD_HOST_DEVICE constexpr int matrix_column(int lane, int e) {
  return lane % 4 * 2 + e % 2 + e / 4 * 8;
}

// Where the row begins that the lane names when an operand is loaded, a left one that lies
// transposed or a right one that does not: a loop over many p needs it once.
__device__ __forceinline__ int left_row(int stride) {
  const int lane = threadIdx.x % kWarp;
  return (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
}
__device__ __forceinline__ int right_row(int stride) {
  const int lane = threadIdx.x % kWarp;
  return lane % 16 * stride + lane / 16 * 8;
}

}  // namespace singd::cuda

#if defined(SINGD_EMULATION)
#include "../emulation/matrix.h"
#else

namespace singd::cuda {

namespace detail {

// Four 8 x 8 matrices, each by its own 8 lanes' row addresses; the lane gives one of them.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

template <class T>
__device__ __forceinline__ void multiply_half(float* c, const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace detail

// A from shared memory: A[i, k] = p[i * stride + k], or p[k * stride + i] if transposed. p and rows
// are aligned to 16 bytes.
template <bool kTransposed, class T>
__device__ __forceinline__ void load_left(MatrixOperand<T>& a, const T* p, int stride) {
  const int lane = threadIdx.x % kWarp, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
  const T* const row =
      kTransposed ? p + (lane % 8 + high) * stride + low : p + (lane % 8 + low) * stride + high;
  detail::load_matrices<kTransposed>(a.words, row);
}

// B from shared memory: B[k, j] = p[k * stride + j], or p[j * stride + k] if transposed.
template <bool kTransposed, class T>
__device__ __forceinline__ void load_right(MatrixOperand<T>& b, const T* p, int stride) {
  const int lane = threadIdx.x % kWarp, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
  const T* const row =
      kTransposed ? p + (lane % 8 + high) * stride + low : p + (lane % 8 + low) * stride + high;
  detail::load_matrices<!kTransposed>(b.words, row);
}

// As load_left<true>(a, p, stride) with row = p + left_row(stride), and load_right<false>(b, p,
// stride) with row = p + right_row(stride).
template <class T>
__device__ __forceinline__ void load_left_row(MatrixOperand<T>& a, const T* row, int /*stride*/) {
  detail::load_matrices<true>(a.words, row);
}
template <class T>
__device__ __forceinline__ void load_right_row(MatrixOperand<T>& b, const T* row, int /*stride*/) {
  detail::load_matrices<true>(b.words, row);
}

template <class T>
__device__ __forceinline__ void multiply(MatrixSums& c, const MatrixOperand<T>& a,
                                         const MatrixOperand<T>& b) {
  detail::multiply_half<T>(c.values, a.words, b.words[0], b.words[1]);
  detail::multiply_half<T>(c.values + 4, a.words, b.words[2], b.words[3]);
}

}  // namespace singd::cuda

#endif
