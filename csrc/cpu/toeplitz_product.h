// Products with a triangular Toeplitz matrix R, R[i, j] = a[j - i], in panels of columns of R, or
// of R^T. All panels are pieces of the widest: there is no d x d matrix, and of the zeros only
// those beside the diagonal are multiplied.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../structures/layout.h"
#include "aten_product.h"

namespace singd::cpu {

class ToeplitzPanels {
 public:
  // Of d numbers a. Causal: R^T x and x R; otherwise R x and x R^T.
  template <class T>
  ToeplitzPanels(const T* a, int64_t d, bool causal)
      : causal_(causal),
        dim_(d),
        width_(panel_width(d)),
        widest_(at::empty({d, width_}, c10::CppTypeToScalarType<T>::value)) {
    T* rows = widest_.mutable_data_ptr<T>();
    at::parallel_for(0, d, 128, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = rows + i * width_;
        if (causal) {  // a[d - width + j - i], to the last columns
          const int64_t zeros = std::max<int64_t>(0, i - (d - width_));
          std::fill_n(row, zeros, T(0));
          std::copy_n(a + (d - width_ - i + zeros), width_ - zeros, row + zeros);
        } else {  // a[i - j], to the first
          const int64_t count = std::min(i + 1, width_);
          std::reverse_copy(a + i + 1 - count, a + i + 1, row);
          std::fill_n(row + count, width_ - count, T(0));
        }
      }
    });
  }

  // y <- R^T x or R x, if on the left; x R or x R^T, where x may lack a last column of ones.
  void multiply(Side side, const at::Tensor& x, const at::Tensor& y) const {
    for (int64_t done = 0; done < dim_; done += width_) {
      const int64_t width = std::min(width_, dim_ - done), depth = dim_ - done;
      const int64_t from = causal_ ? 0 : done, to = causal_ ? depth - width : done;
      const at::Tensor panel = widest_.narrow(0, causal_ ? done : 0, depth)
                                   .narrow(1, causal_ ? width_ - width : 0, width);
      at::Tensor out = y.narrow(side == Side::kLeft ? 0 : 1, to, width);
      if (side == Side::kLeft) {
        product_out(panel.t(), x.narrow(0, from, depth), out);
      } else if (from + depth <= x.size(1)) {
        product_out(x.narrow(1, from, depth), panel, out);
      } else {
        at::addmm_out(out, panel[depth - 1], x.narrow(1, from, depth - 1),
                      panel.narrow(0, 0, depth - 1));
      }
    }
  }

 private:
  bool causal_;
  int64_t dim_, width_;
  at::Tensor widest_;
};

}  // namespace singd::cpu
