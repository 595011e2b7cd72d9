#include "call_checks.h"

#include <ATen/MemoryOverlap.h>

#include <utility>

namespace singd {
namespace {

void check_sums(const char* op, const char* name, const at::Tensor& sums) {
  const auto dtype = sums.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "singd_ext::", op, ": ", name,
                   " has dtype ", dtype, "; sums need float32 or float64");
}

// One int64 number that counts incidents of a layer.
void check_counter(const char* op, const char* name, const at::Tensor& counter,
                   const at::Device& device) {
  TORCH_CHECK_VALUE(counter.scalar_type() == at::kLong && counter.numel() == 1, "singd_ext::", op,
                    ": ", name, " must be one int64 number a layer, but has dtype ",
                    counter.scalar_type(), " and shape ", counter.sizes());
  check_on_device(op, name, counter, device);
}

void check_state(const char* op, const char* name, const at::Tensor& factor,
                 const at::Tensor* momentum, const at::Tensor& statistic, int64_t dim,
                 const std::string& structure, const at::Device& device) {
  const Layout layout = checked_layout(op, structure, dim);
  const std::string momentum_name = std::string("m_") + name;
  const std::string statistic_name = std::string("statistic_") + name;
  check_factor(op, name, factor, structure, layout);
  check_factor(op, statistic_name.c_str(), statistic, structure, layout);
  check_on_device(op, name, factor, device);
  check_on_device(op, statistic_name.c_str(), statistic, device);
  check_sums(op, statistic_name.c_str(), statistic);
  if (momentum == nullptr) return;
  check_factor(op, momentum_name.c_str(), *momentum, structure, layout);
  check_on_device(op, momentum_name.c_str(), *momentum, device);
}

void check_part(const char* op, const char* name, const Part& part, int64_t rows,
                const at::Device& device) {
  check_dtype(op, name, part.parameter);
  check_dtype(op, name, part.gradient);
  at::assert_no_internal_overlap(part.parameter);
  TORCH_CHECK_VALUE(part.gradient.sizes() == part.parameter.sizes(), "singd_ext::", op, ": ", name,
                    " has shape ", part.parameter.sizes(), " but its gradient has shape ",
                    part.gradient.sizes());
  TORCH_CHECK_VALUE(part.parameter.dim() >= 1 && part.parameter.size(0) == rows, "singd_ext::", op,
                    ": ", name, " of shape ", part.parameter.sizes(), " does not have ", rows,
                    " rows");
  check_on_device(op, name, part.parameter, device);
  check_on_device(op, "a gradient", part.gradient, device);
  if (!part.momentum.defined()) return;
  check_dtype(op, name, part.momentum);
  at::assert_no_internal_overlap(part.momentum);
  TORCH_CHECK_VALUE(part.momentum.sizes() == part.parameter.sizes(), "singd_ext::", op, ": ", name,
                    " has shape ", part.parameter.sizes(), " but its momentum has shape ",
                    part.momentum.sizes());
  check_on_device(op, "a momentum", part.momentum, device);
}

LayerFactor checked_factor(const char* op, const char* name, const at::Tensor& storage,
                           const at::Tensor* product, int64_t dim, const std::string& structure,
                           const at::Device& device) {
  LayerFactor factor{checked_layout(op, structure, dim), storage, {}};
  check_factor(op, name, storage, structure, factor.layout);
  check_on_device(op, name, storage, device);
  if (product == nullptr || product->numel() == 0) return factor;
  check_dtype(op, name, *product);
  check_on_device(op, name, *product, device);
  TORCH_CHECK_VALUE(factor.layout.family == Family::kDense, "singd_ext::", op, ": P_", name,
                    " is only kept for dense and triangular factors");
  TORCH_CHECK_VALUE(product->dim() == 2 && product->size(0) == dim && product->size(1) == dim &&
                        product->is_contiguous(),
                    "singd_ext::", op, ": P_", name, " has shape ", product->sizes(),
                    ", expected a contiguous [", dim, ", ", dim, "]");
  factor.product = *product;
  return factor;
}

LayerStep checked_step(const char* op, const StepLists& l, size_t n, bool has_momenta,
                       const at::Device& device) {
  const at::Tensor& weight = l.weight[n];
  TORCH_CHECK_VALUE(weight.dim() >= 1 && weight.numel() > 0, "singd_ext::", op,
                    ": weight of shape ", weight.sizes(), " is empty");
  const int64_t rows = weight.size(0), width = weight.numel() / rows;
  const auto momentum = [&](at::TensorList list) { return has_momenta ? list[n] : at::Tensor(); };
  LayerStep step;
  step.parts.push_back({weight, momentum(l.momentum_weight), l.grad_weight[n], 0, width});
  check_part(op, "weight", step.parts.back(), rows, device);
  if (l.bias[n].numel() > 0) {  // a layer without bias holds its place with an empty tensor
    step.parts.push_back({l.bias[n], momentum(l.momentum_bias), l.grad_bias[n], width, 1});
    check_part(op, "bias", step.parts.back(), rows, device);
    TORCH_CHECK_VALUE(l.bias[n].numel() == rows, "singd_ext::", op, ": bias has shape ",
                      l.bias[n].sizes(), " but the weight has ", rows, " rows");
  }
  const int64_t columns = step.parts.back().begin + step.parts.back().width;
  step.K = checked_factor(op, "K", l.K[n], l.P_K.empty() ? nullptr : &l.P_K[n], columns,
                          l.structure_K, device);
  step.C = checked_factor(op, "C", l.C[n], l.P_C.empty() ? nullptr : &l.P_C[n], rows, l.structure_C,
                          device);
  step.skipped = l.skipped[n];
  check_counter(op, "skipped", step.skipped, device);
  return step;
}

}  // namespace

Layout checked_statistic(const char* op, const at::Tensor& statistic, const at::Tensor& rows,
                         const at::Tensor& factor, int64_t dim, const std::string& structure,
                         bool ones_column) {
  const Layout layout = checked_layout(op, structure, dim);
  check_factor(op, "statistic", statistic, structure, layout);
  check_factor(op, "factor", factor, structure, layout);
  check_dtype(op, "rows", rows);
  check_ndim(op, "rows", rows, 3);
  check_on_device(op, "rows", rows, statistic.device());
  check_on_device(op, "factor", factor, statistic.device());
  check_sums(op, "statistic", statistic);
  TORCH_CHECK_VALUE(rows.size(2) + (ones_column ? 1 : 0) == dim, "singd_ext::", op,
                    ": rows of shape ", rows.sizes(), ones_column ? " with a column of ones" : "",
                    " do not fit a factor '", structure, "' of dimension ", dim);
  return layout;
}

Matmul checked_matmul(const char* op, const at::Tensor& factor, int64_t dim,
                      const std::string& structure, const at::Tensor& other,
                      const std::string& side) {
  const Layout layout = checked_layout(op, structure, dim);
  check_factor(op, "factor", factor, structure, layout);
  check_dtype(op, "other", other);
  check_ndim(op, "other", other, 2);
  check_on_device(op, "other", other, factor.device());
  const Side where = checked_side(op, side);
  const int64_t inner = where == Side::kLeft ? other.size(0) : other.size(1);
  TORCH_CHECK_VALUE(inner == dim, "singd_ext::", op, ": a factor of dimension ", dim, " ('",
                    structure, "') on the ", side, " does not fit a matrix of shape ",
                    other.sizes());
  return {layout, where};
}

Layout checked_product(const char* op, const at::Tensor& a, const at::Tensor& b, int64_t dim,
                       const std::string& structure) {
  const Layout layout = checked_layout(op, structure, dim);
  check_factor(op, "a", a, structure, layout);
  check_factor(op, "b", b, structure, layout);
  check_on_device(op, "b", b, a.device());
  return layout;
}

Layout checked_square(const char* op, const char* name, const at::Tensor& matrix,
                      const std::string& structure) {
  check_dtype(op, name, matrix);
  check_ndim(op, name, matrix, 2);
  TORCH_CHECK_VALUE(matrix.size(0) == matrix.size(1), "singd_ext::", op, ": ", name,
                    " must be square, but has shape ", matrix.sizes());
  return checked_layout(op, structure, matrix.size(0));
}

Layout checked_rows(const char* op, const at::Tensor& rows, const std::string& structure) {
  check_dtype(op, "rows", rows);
  check_ndim(op, "rows", rows, 2);
  return checked_layout(op, structure, rows.size(1));
}

void check_factor_lists(const char* op, const FactorLists& l, bool has_momenta,
                        const at::Device& device) {
  const size_t layers = l.K.size(), momenta = has_momenta ? layers : 0;
  check_length(op, "C", l.C.size(), layers);
  check_length(op, "m_K", l.m_K.size(), momenta);
  check_length(op, "m_C", l.m_C.size(), momenta);
  check_length(op, "rejected", l.rejected.size(), layers);
  check_length(op, "statistic_K", l.statistic_K.size(), layers);
  check_length(op, "statistic_C", l.statistic_C.size(), layers);
  check_length(op, "scale_K", l.scale_K.size(), layers);
  check_length(op, "scale_C", l.scale_C.size(), layers);
  check_length(op, "dim_K", l.dim_K.size(), layers);
  check_length(op, "dim_C", l.dim_C.size(), layers);
  for (size_t n = 0; n < layers; ++n) {
    check_state(op, "K", l.K[n], has_momenta ? &l.m_K[n] : nullptr, l.statistic_K[n], l.dim_K[n],
                l.structure_K, device);
    check_state(op, "C", l.C[n], has_momenta ? &l.m_C[n] : nullptr, l.statistic_C[n], l.dim_C[n],
                l.structure_C, device);
    check_counter(op, "rejected", l.rejected[n], device);
  }
}

void check_factor_options(const char* op, int64_t expm_order, double step_cap) {
  TORCH_CHECK_VALUE(expm_order == 1 || expm_order == 2, "singd_ext::", op, ": expm_order is ",
                    expm_order, "; allowed are 1 and 2");
  TORCH_CHECK_VALUE(step_cap > 0, "singd_ext::", op, ": step_cap is ", step_cap,
                    "; it must be positive (infinity switches it off)");
}

std::vector<LayerStep> checked_steps(const char* op, const StepLists& l, bool has_momenta,
                                     const at::Device& device) {
  const size_t layers = l.weight.size(), momenta = has_momenta ? layers : 0;
  check_length(op, "bias", l.bias.size(), layers);
  check_length(op, "momentum_weight", l.momentum_weight.size(), momenta);
  check_length(op, "momentum_bias", l.momentum_bias.size(), momenta);
  check_length(op, "skipped", l.skipped.size(), layers);
  check_length(op, "grad_weight", l.grad_weight.size(), layers);
  check_length(op, "grad_bias", l.grad_bias.size(), layers);
  check_length(op, "K", l.K.size(), layers);
  check_length(op, "C", l.C.size(), layers);
  check_length(op, "P_K", l.P_K.size(), l.P_K.empty() ? 0 : layers);
  check_length(op, "P_C", l.P_C.size(), l.P_C.empty() ? 0 : layers);
  std::vector<LayerStep> steps;
  steps.reserve(layers);
  for (size_t n = 0; n < layers; ++n) {
    steps.push_back(checked_step(op, l, n, has_momenta, device));
  }
  return steps;
}

}  // namespace singd
