// The operators of singd_ext, declared once for all devices. `structure` is a spec string such as
// "block_diagonal:30"; a factor travels as its flat storage (csrc/structures/spec.h) beside its
// dimension. singd_ext/ops.py documents every operator.
#include <torch/library.h>

#include "cuda/runtime.h"

TORCH_LIBRARY(SINGD_LIBRARY, m) {
  // Building blocks.
  m.def("project(Tensor symmetric, str structure) -> Tensor");
  m.def("project_gram(Tensor rows, str structure) -> Tensor");
  m.def("extract(Tensor dense, str structure) -> Tensor");
  m.def("to_dense(Tensor factor, int dim, str structure) -> Tensor");
  m.def(
      "structured_matmul(Tensor factor, int dim, str structure, Tensor other, *, "
      "str side=\"left\", bool transpose=False) -> Tensor");
  m.def("structured_product(Tensor a, Tensor b, int dim, str structure) -> Tensor");
  m.def("factor_gram(Tensor factor, int dim, str structure) -> Tensor");

  // The hot path.
  m.def(
      "accumulate_statistic_(Tensor(a!) statistic, Tensor rows, Tensor factor, int dim, "
      "str structure, *, bool ones_column=False, str shared=\"expand\", "
      "bool overwrite=False) -> ()");
  m.def(
      "update_factors_(Tensor(a!)[] K, Tensor(b!)[] C, Tensor(c!)[] m_K, Tensor(d!)[] m_C, "
      "Tensor(e!)[] rejected, Tensor[] statistic_K, Tensor[] statistic_C, float[] scale_K, "
      "float[] scale_C, int[] dim_K, int[] dim_C, str structure_K, str structure_C, *, "
      "Tensor lr_cov, float damping, float alpha1, bool kfac_like, bool normalize_lr_cov, "
      "int expm_order, float step_cap, Tensor(f!) outcomes, Tensor(g!) workspace, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, int[]? rounding_key=None) -> ()");
  m.def(
      "preconditioned_update_(Tensor(a!)[] weight, Tensor(b!)[] bias, "
      "Tensor(c!)[] momentum_weight, Tensor(d!)[] momentum_bias, Tensor(e!)[] skipped, "
      "Tensor[] grad_weight, Tensor[] grad_bias, Tensor[] K, Tensor[] C, Tensor[] P_K, "
      "Tensor[] P_C, str structure_K, str structure_C, *, Tensor lr, float momentum, "
      "float weight_decay, Tensor(f!) outcomes, Tensor(g!) workspace, Tensor(h!)? products=None, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, int[]? rounding_key=None) -> ()");
}
