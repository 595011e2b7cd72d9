#include "op_checks.h"

#include <stdexcept>

#include "structures/spec.h"

namespace singd {

Layout checked_layout(const char* op, const std::string& structure, int64_t dim) {
  try {
    return make_layout(structure, dim);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "singd_ext::", op, ": ", error.what());
  }
}

void check_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      "singd_ext::", op, ": ", name, " has dtype ", dtype,
      "; supported are float64, float32, bfloat16, float16");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, "singd_ext::", op, ": ", name,
                   " is not a dense (strided) tensor");
}

void check_ndim(const char* op, const char* name, const at::Tensor& tensor, int64_t ndim) {
  TORCH_CHECK_VALUE(tensor.dim() == ndim, "singd_ext::", op, ": ", name, " needs ", ndim,
                    " dimensions, but has shape ", tensor.sizes());
}

void check_factor(const char* op, const char* name, const at::Tensor& factor,
                  const std::string& structure, const Layout& layout) {
  check_dtype(op, name, factor);
  const int64_t size = storage_size(layout);
  TORCH_CHECK_VALUE(factor.dim() == 1 && factor.numel() == size, "singd_ext::", op, ": ", name,
                    " has shape ", factor.sizes(), ", but structure '", structure,
                    "' of dimension ", layout.dim, " stores ", size, " numbers");
  TORCH_CHECK_VALUE(factor.is_contiguous(), "singd_ext::", op, ": ", name,
                    " must be contiguous, but has strides ", factor.strides());
}

void check_on_device(const char* op, const char* name, const at::Tensor& tensor,
                     const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.device() == device, "singd_ext::", op, ": ", name, " is on ",
                    tensor.device(), ", but the operator runs on ", device);
}

void check_length(const char* op, const char* name, size_t length, size_t expected) {
  TORCH_CHECK_VALUE(length == expected, "singd_ext::", op, ": list ", name, " has ", length,
                    " entries, expected ", expected);
}

void check_outcomes(const char* op, const at::Tensor& outcomes, size_t layers) {
  TORCH_CHECK_VALUE(outcomes.scalar_type() == at::kLong && outcomes.is_contiguous() &&
                        outcomes.dim() == 1 && outcomes.numel() == static_cast<int64_t>(layers),
                    "singd_ext::", op, ": outcomes must be a contiguous int64 tensor of shape [",
                    layers, "], but has dtype ", outcomes.scalar_type(), " and shape ",
                    outcomes.sizes());
}

double checked_scalar(const char* op, const char* name, const at::Tensor& scalar) {
  TORCH_CHECK_VALUE(scalar.numel() == 1, "singd_ext::", op, ": ", name,
                    " must hold one number, but has shape ", scalar.sizes());
  // What `item` does, without torch's way to it, which is cold in a step.
  const bool is_here = scalar.is_cpu() && scalar.scalar_type() == at::kDouble;
  return is_here ? *scalar.const_data_ptr<double>() : scalar.item().toDouble();
}

Scaler checked_scaler(const char* op, const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf) {
  return {grad_scale.has_value() ? 1.0 / checked_scalar(op, "grad_scale", *grad_scale) : 1.0,
          found_inf.has_value() && checked_scalar(op, "found_inf", *found_inf) != 0};
}

RoundingKey checked_rounding_key(const char* op, const std::optional<at::IntArrayRef>& key) {
  if (!key.has_value()) return {};
  TORCH_CHECK_VALUE(key->size() == 2, "singd_ext::", op, ": rounding_key must be [seed, step]");
  return RoundingKey::make((*key)[0], (*key)[1]);
}

Side checked_side(const char* op, const std::string& side) {
  TORCH_CHECK_VALUE(side == "left" || side == "right", "singd_ext::", op, ": side is '", side,
                    "'; allowed are 'left' and 'right'");
  return side == "left" ? Side::kLeft : Side::kRight;
}

Shared checked_shared(const char* op, const std::string& shared) {
  TORCH_CHECK_VALUE(shared == "expand" || shared == "mean" || shared == "sum", "singd_ext::", op,
                    ": shared is '", shared, "'; allowed are 'expand', 'mean' and 'sum'");
  if (shared == "expand") return Shared::kExpand;
  return shared == "mean" ? Shared::kMean : Shared::kSum;
}

}  // namespace singd
