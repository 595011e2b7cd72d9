// Matrix products of size, which are ATen's: of MKL or, where that is faster, of oneDNN.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

namespace singd::cpu {

// Whether products of matrices of this type, with so many multiply-adds, are oneDNN's. It copies
// a matrix on the right whose rows or columns are not side by side.
bool multiplies_in_onednn(at::ScalarType dtype, int64_t multiply_adds);

// Columns at a time where half of a product would be of no use: with narrower panels less of that
// is multiplied, wider ones are faster.
inline int64_t panel_width(int64_t d) {
  const int64_t panels = std::max<int64_t>(1, (d + 128) / 256);
  return (d + panels - 1) / panels;
}

// A B, and C <- A B.
at::Tensor product(const at::Tensor& a, const at::Tensor& b);
void product_out(const at::Tensor& a, const at::Tensor& b, at::Tensor& c);

// K K^T of a square matrix, in K's type: float32 or float64.
at::Tensor times_its_transpose(const at::Tensor& square);

}  // namespace singd::cpu
