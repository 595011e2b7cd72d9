// The checks that both devices share. Every message names the operator, the structure and what was
// given; a failed check leaves every argument as it was.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "structures/layout.h"
#include "structures/rounding.h"

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

// Every tensor of an operator lies on the device that the operator runs on.
void check_on_device(const char* op, const char* name, const at::Tensor& tensor,
                     const at::Device& device);

// Lists of the same length.
void check_length(const char* op, const char* name, size_t length, size_t expected);

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

// The optional rounding_key is [seed, step]; without it stores round to nearest.
RoundingKey checked_rounding_key(const char* op, const std::optional<at::IntArrayRef>& key);

Side checked_side(const char* op, const std::string& side);

// What becomes of the shared dimension of rows [batch, shared, features].
enum class Shared { kExpand, kMean, kSum };
Shared checked_shared(const char* op, const std::string& shared);

}  // namespace singd
