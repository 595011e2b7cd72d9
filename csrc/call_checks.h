// The arguments of whole calls, checked once for all devices: every check comes before the first
// change. Messages are those of op_checks.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "op_checks.h"
#include "structures/layout.h"

namespace singd {

// accumulate_statistic_.
Layout checked_statistic(const char* op, const at::Tensor& statistic, const at::Tensor& rows,
                         const at::Tensor& factor, int64_t dim, const std::string& structure,
                         bool ones_column);

// structured_matmul: the layout, and the side of the factor.
struct Matmul {
  Layout layout;
  Side side;
};
Matmul checked_matmul(const char* op, const at::Tensor& factor, int64_t dim,
                      const std::string& structure, const at::Tensor& other,
                      const std::string& side);

// structured_product.
Layout checked_product(const char* op, const at::Tensor& a, const at::Tensor& b, int64_t dim,
                       const std::string& structure);

// project and extract: the layout for a square matrix.
Layout checked_square(const char* op, const char* name, const at::Tensor& matrix,
                      const std::string& structure);

// project_gram.
Layout checked_rows(const char* op, const at::Tensor& rows, const std::string& structure);

// update_factors_: lists with an entry a layer; no momenta if alpha1 = 0.
struct FactorLists {
  at::TensorList K, C, m_K, m_C, rejected, statistic_K, statistic_C;
  at::ArrayRef<double> scale_K, scale_C;
  at::IntArrayRef dim_K, dim_C;
  const std::string &structure_K, &structure_C;
};
void check_factor_lists(const char* op, const FactorLists& lists, bool has_momenta,
                        const at::Device& device);
void check_factor_options(const char* op, int64_t expm_order, double step_cap);

// preconditioned_update_: lists with an entry a layer; no momenta if alpha2 = 0.
struct StepLists {
  at::TensorList weight, bias, momentum_weight, momentum_bias, skipped, grad_weight, grad_bias, K,
      C, P_K, P_C;
  const std::string &structure_K, &structure_C;
};

// The columns [begin, begin + width) of a layer's matrix W that one parameter holds: the weight, or
// the bias as the last column.
struct Part {
  at::Tensor parameter, momentum, gradient;  // momentum is undefined if alpha2 = 0
  int64_t begin, width;
};

// One factor of a layer and, where the caller keeps it, the dense product F F^T.
struct LayerFactor {
  Layout layout;
  at::Tensor storage, product;
};

struct LayerStep {
  std::vector<Part> parts;
  at::Tensor skipped;
  LayerFactor K, C;
};
std::vector<LayerStep> checked_steps(const char* op, const StepLists& lists, bool has_momenta,
                                     const at::Device& device);

}  // namespace singd
