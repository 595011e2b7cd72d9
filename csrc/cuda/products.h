// Products with a structured factor through ATen: of its library products and FFTs, the ones that
// suit the family. For factors and matrices of one dtype, which is any of the four.
#pragma once

#include <ATen/core/Tensor.h>

#include "../structures/layout.h"

namespace singd::cuda {

// op(K) x for x [dim, n] (Side::kLeft) or x op(K) for x [n, dim] (Side::kRight), where op(K) is K
// or, if `transpose`, its transpose. `factor` is the flat storage of K; x has any strides. The
// result is new and contiguous. Nothing but thin borders is copied; what is summed is rounded to
// the dtype of x once a library product. Launches on the current stream of the current device.
at::Tensor multiply(const Layout& layout, const at::Tensor& factor, Side side, bool transpose,
                    const at::Tensor& x);

}  // namespace singd::cuda
