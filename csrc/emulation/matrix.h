// Matrix products on the tensor cores, as csrc/cuda/matrix.cuh declares them.
//
// A lane loads its own elements when it gets there, and a product waits for all lanes of the warp:
// so a missing __syncwarp shows, and so does a lane that stays away.
#pragma once

#include <cstdint>

#include "counters.h"
#include "emulator.h"

namespace singd::emulation {

constexpr int kMaxWarps = 32;

// What the lanes of each warp bring to a product.
template <class T>
struct Operands {
  T a[kMaxWarps][16][16], b[kMaxWarps][16][16];
};
template <class T>
Operands<T> operands;

template <class T>
void check_matrix(const T* p, int stride) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0 || stride * sizeof(T) % 16 != 0) {
    fail("a matrix whose rows are not aligned to 16 bytes");
  }
  if (counting && running.thread.x % 32 == 0) {
    count_matrix(p, sizeof(T) * static_cast<size_t>(stride));
  }
}

template <class T>
T half_of(const uint32_t (&words)[4], int w, int h) {
  T value;
  memcpy(static_cast<void*>(&value), reinterpret_cast<const char*>(words + w) + h * sizeof(T),
         sizeof(T));
  return value;
}

template <class T>
void load_operand(uint32_t (&words)[4], const T* p, int stride, bool left, bool transposed) {
  check_matrix(p, stride);
  const int lane = static_cast<int>(running.thread.x % 32), q = lane / 4;
  for (int w = 0; w < 4; ++w) {
    for (int h = 0; h < 2; ++h) {
      const int pair = lane % 4 * 2 + h;
      const int row = left ? q + w % 2 * 8 : pair + w % 2 * 8;
      const int column = left ? pair + w / 2 * 8 : q + w / 2 * 8;
      const T* const from = transposed ? p + column * stride + row : p + row * stride + column;
      check_shared("a matrix", from, sizeof(T));
      memcpy(reinterpret_cast<char*>(words + w) + h * sizeof(T), from, sizeof(T));
    }
  }
}

}  // namespace singd::emulation

namespace singd::cuda {

template <bool kTransposed, class T>
void load_left(MatrixOperand<T>& a, const T* p, int stride) {
  emulation::load_operand(a.words, p, stride, true, kTransposed);
}

template <bool kTransposed, class T>
void load_right(MatrixOperand<T>& b, const T* p, int stride) {
  emulation::load_operand(b.words, p, stride, false, kTransposed);
}

template <class T>
void load_left_row(MatrixOperand<T>& a, const T* row, int stride) {
  load_left<true>(a, row - left_row(stride), stride);
}

template <class T>
void load_right_row(MatrixOperand<T>& b, const T* row, int stride) {
  load_right<false>(b, row - right_row(stride), stride);
}

template <class T>
void multiply(MatrixSums& c, const MatrixOperand<T>& a, const MatrixOperand<T>& b,
              emulation::Site site = emulation::Site::here()) {
  using namespace emulation;
  const int lane = static_cast<int>(running.thread.x % 32), q = lane / 4;
  auto& left = operands<T>.a[running.thread.x / 32];
  auto& right = operands<T>.b[running.thread.x / 32];
  for (int w = 0; w < 4; ++w) {
    for (int h = 0; h < 2; ++h) {
      const int pair = lane % 4 * 2 + h;
      left[q + w % 2 * 8][pair + w / 2 * 8] = half_of<T>(a.words, w, h);
      right[pair + w % 2 * 8][q + w / 2 * 8] = half_of<T>(b.words, w, h);
    }
  }
  exchange(Operation::kSyncWarp, 0xFFFFFFFFu, 0, 0, 32, site);
  for (int e = 0; e < 8; ++e) {
    const int i = matrix_row(lane, e), j = matrix_column(lane, e);
    for (int k = 0; k < 16; ++k) {
      c.values[e] += static_cast<float>(left[i][k]) * static_cast<float>(right[k][j]);
    }
  }
  exchange(Operation::kSyncWarp, 0xFFFFFFFFu, 0, 0, 32, site);
}

}  // namespace singd::cuda
