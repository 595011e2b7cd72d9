// The checks that both devices share. Every message names the operator, the structure and what was
// given; a failed check leaves every argument as it was.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "structures/layout.h"

namespace singd {

// The layout of a spec; ValueError for a bad spec or dimension.
Layout checked_layout(const char* op, const std::string& structure, int64_t dim);

// float64, float32, bfloat16 or float16.
void check_dtype(const char* op, const char* name, const at::Tensor& tensor);

// `tensor` has this many dimensions.
void check_ndim(const char* op, const char* name, const at::Tensor& tensor, int64_t ndim);

// `factor` is the contiguous flat storage of this layout.
void check_factor(const char* op, const char* name, const at::Tensor& factor,
                  const std::string& structure, const Layout& layout);

// Two tensors on the same device.
void check_same_device(const char* op, const at::Tensor& a, const at::Tensor& b);

// Lists of the same length.
void check_length(const char* op, const char* name, size_t length, size_t expected);

// `product` is a cached F F^T of a dense-family factor F of this layout.
void check_cached_product(const char* op, const char* name, const at::Tensor& product,
                          const Layout& layout);

// `outcomes` takes an int64 code for every layer.
void check_outcomes(const char* op, const at::Tensor& outcomes, size_t layers);

// A 0-dimensional float tensor that holds a scalar.
double checked_scalar(const char* op, const char* name, const at::Tensor& scalar);

// What a gradient scaler hands to an operator: the factor that undoes its scale, and whether it
// found an infinity, so that nothing may be done.
struct Scaler {
  double unscale;
  bool found_inf;
};
Scaler checked_scaler(const char* op, const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf);

Side checked_side(const char* op, const std::string& side);

// What becomes of the shared dimension of rows [batch, shared, features].
enum class Shared { kExpand, kMean, kSum };
Shared checked_shared(const char* op, const std::string& shared);

}  // namespace singd
