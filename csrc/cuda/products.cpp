#include "products.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/conj_physical.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/fft_irfft.h>
#include <ATen/ops/fft_rfft.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include "../structures/toeplitz.h"
#include "elementwise.h"
#include "runtime.h"

namespace singd::cuda {
namespace {

// Dimension up to which Toeplitz factors are multiplied as dense matrices, as on the CPU.
constexpr int64_t kDirectToeplitz = 256;

// The functions below compute y = op(K) x for x and y [dim, n] of any strides. They write to y
// through views of it, so that no part of the result is copied.

void multiply_dense(const Layout& layout, const at::Tensor& factor, bool transpose,
                    const at::Tensor& x, at::Tensor& y) {
  const at::Tensor k = factor.view({layout.dim, layout.dim});
  at::mm_out(y, transpose ? k.t() : k, x);
}

void multiply_diagonal(const at::Tensor& factor, const at::Tensor& x, at::Tensor& y) {
  at::mul_out(y, x, factor.unsqueeze(1));
}

// The rows of the equal blocks as a batch [blocks, block, n], and the remainder on its own.
void multiply_block_diagonal(const Layout& layout, const at::Tensor& factor, bool transpose,
                             const at::Tensor& x, at::Tensor& y) {
  const int64_t k = layout.block, count = layout.dim / k, rest = layout.dim % k;
  const auto in_blocks = [&](const at::Tensor& rows) {
    return rows.narrow(0, 0, count * k).unflatten(0, {count, k});
  };
  const at::Tensor blocks = factor.narrow(0, 0, count * k * k).view({count, k, k});
  at::Tensor out = in_blocks(y);
  at::bmm_out(out, transpose ? blocks.transpose(1, 2) : blocks, in_blocks(x));
  if (rest == 0) return;
  const at::Tensor last = factor.narrow(0, count * k * k, rest * rest).view({rest, rest});
  at::Tensor last_out = y.narrow(0, count * k, rest);
  at::mm_out(last_out, transpose ? last.t() : last, x.narrow(0, count * k, rest));
}

// With the stored matrix R, border rows E = R[B, :] and diagonal D on the interior I:
//   (R x)[B] = E x, (R x)[I] = D x[I]        R^T x = E^T x[B], plus D x[I] in the rows I
// One product serves both ends of the border: its b rows are copied, the d rows of x or y are not.
void multiply_bordered(const Layout& layout, const at::Tensor& factor, bool transpose,
                       const at::Tensor& x, at::Tensor& y) {
  const int64_t d = layout.dim, head = layout.head, tail = layout.tail;
  const int64_t border = head + tail, interior = d - border;
  const at::Tensor e = factor.narrow(0, 0, border * d).view({border, d});
  at::Tensor y_interior = y.narrow(0, head, interior);
  multiply_diagonal(factor.narrow(0, border * d, interior), x.narrow(0, head, interior),
                    y_interior);
  if (transpose != layout.transposed) {
    y.narrow(0, 0, head).zero_();
    y.narrow(0, d - tail, tail).zero_();
    const at::Tensor x_head = x.narrow(0, 0, head), x_tail = x.narrow(0, d - tail, tail);
    y.addmm_(e.t(), tail == 0 ? x_head : head == 0 ? x_tail : at::cat({x_head, x_tail}));
  } else {
    const at::Tensor y_border = at::mm(e, x);
    y.narrow(0, 0, head).copy_(y_border.narrow(0, 0, head));
    y.narrow(0, d - tail, tail).copy_(y_border.narrow(0, head, tail));
  }
}

// The upper Toeplitz R is an anticausal convolution with its first row, R^T a causal one.
void convolve(const Layout& layout, const at::Tensor& factor, bool transpose, const at::Tensor& x,
              at::Tensor& y) {
  const int64_t n = fft_length(layout.dim);
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor kernel = at::fft_rfft(factor.to(dtype), n, 0);
  if (transpose == layout.transposed) kernel = at::conj_physical(kernel);
  const at::Tensor product = at::fft_rfft(x.to(dtype), n, 0).mul_(kernel.unsqueeze(1));
  y.copy_(at::fft_irfft(product, n, 0).narrow(0, 0, layout.dim));
}

// Small factors are multiplied as dense ones: faster, and without the FFT's rounding, which is
// relative to the largest entries of the factor and of a column of x, however small the result.
void multiply_toeplitz(const Layout& layout, const at::Tensor& factor, bool transpose,
                       const at::Tensor& x, at::Tensor& y) {
  if (layout.dim > kDirectToeplitz) return convolve(layout, factor, transpose, x, y);
  const at::Tensor dense = at::empty({layout.dim, layout.dim}, factor.options());
  to_dense(layout, dtype_of(factor), factor.const_data_ptr(), dense.mutable_data_ptr(),
           current_stream(factor));
  multiply_dense(layout, dense, transpose, x, y);
}

void multiply_left(const Layout& layout, const at::Tensor& factor, bool transpose,
                   const at::Tensor& x, at::Tensor& y) {
  switch (layout.family) {
    case Family::kDense:
      return multiply_dense(layout, factor, transpose, x, y);
    case Family::kDiagonal:
      return multiply_diagonal(factor, x, y);
    case Family::kBlockDiagonal:
      return multiply_block_diagonal(layout, factor, transpose, x, y);
    case Family::kBordered:
      return multiply_bordered(layout, factor, transpose, x, y);
    case Family::kToeplitz:
      return multiply_toeplitz(layout, factor, transpose, x, y);
  }
}

}  // namespace

at::Tensor multiply(const Layout& layout, const at::Tensor& factor, Side side, bool transpose,
                    const at::Tensor& x) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  if (side == Side::kLeft) {
    multiply_left(layout, factor, transpose, x, y);
  } else {  // (x op(K))^T = op(K)^T x^T, on views
    at::Tensor y_transposed = y.t();
    multiply_left(layout, factor, !transpose, x.t(), y_transposed);
  }
  return y;
}

}  // namespace singd::cuda
