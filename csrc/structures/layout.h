// A layout says where the numbers of a structured d x d matrix K lie in its flat storage.
// Plain data without torch or the standard library's containers, so that kernels can take it by
// value; the families beside this file give it meaning.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SINGD_HOST_DEVICE __host__ __device__
#else
#define SINGD_HOST_DEVICE
#endif

namespace singd {

enum class Family { kDense, kDiagonal, kBlockDiagonal, kBordered, kToeplitz };

// Which entries of a dense factor may differ from zero.
enum class Triangle { kFull, kLower, kUpper };

struct Layout {
  Family family = Family::kDense;
  int64_t dim = 0;
  // Dense only.
  Triangle triangle = Triangle::kFull;
  // Block-diagonal only: the block size; the last block is the remainder.
  int64_t block = 0;
  // Bordered only: the border is the first `head` and the last `tail` indices.
  int64_t head = 0;
  int64_t tail = 0;
  // Bordered and Toeplitz: the storage holds the transpose R = K^T, which is row-bordered or upper
  // Toeplitz; K itself is then column-bordered or lower Toeplitz.
  bool transposed = false;

  // Diagonal, block-diagonal and bordered factors: a product with one takes a few rows or columns,
  // not the whole matrix.
  SINGD_HOST_DEVICE bool is_local() const {
    return family != Family::kDense && family != Family::kToeplitz;
  }
};

enum class Side { kLeft, kRight };  // K X or X K

}  // namespace singd
