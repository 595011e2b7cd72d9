// update_factors_: the Riemannian momenta and the Kronecker factors of a list of layers (Figure 4
// of the paper, right column). Per layer
//
//   H_K = Pi_K(K^T U K)    H_C = Pi_C(C^T G C)          from the statistics
//   m_K <- alpha1 m_K + s/2 (tr(H_C)/d_o H_K + lambda tr(C^T C)/d_o Pi_K(K^T K) - I)    and
//   m_C <- alpha1 m_C + s/2 (tr(H_K)/d_i H_C + lambda tr(K^T K)/d_i Pi_C(C^T C) - I)
//   K <- K Expm(-beta1 m_K)    C <- C Expm(-beta1 m_C)  truncated after order 1 or 2
//
// and a commit of all four only if all four are finite. Layers with local products go through the
// vectorised kernels together (local_factors.h), others one by one through ATen (whole_factors.h).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#include "../call_checks.h"
#include "../structures/spec.h"
#include "arrays.h"
#include "local_factors.h"
#include "whole_factors.h"

namespace singd::cpu {
namespace {

constexpr const char* kOp = "update_factors_";

// What became of a layer: the codes of the returned tensor.
enum Outcome : int64_t { kCommitted = 0, kRejected = 1, kCapped = 2 };

// `momentum` is null if alpha1 = 0.
FactorTask make_task(const at::Tensor& factor, const at::Tensor* momentum,
                     const at::Tensor& statistic, double scale, int64_t dim,
                     const std::string& structure, const RoundingKey& key) {
  FactorTask task;
  task.layout = make_layout(structure, dim);
  task.size = factor.numel();
  task.statistic = const_array_of(statistic);
  task.factor = array_of(factor);
  if (momentum != nullptr) task.momentum = array_of(*momentum);
  task.scale = scale;
  task.key = key;
  return task;
}

Outcome outcome_of(const FactorTask& k, const FactorTask& c) {
  if (!k.finite || !c.finite) return kRejected;
  return k.capped || c.capped ? kCapped : kCommitted;
}

// Two tasks a layer; report(layer, outcome) for every layer.
template <class Function>
void update_layers(std::vector<FactorTask>& tasks, const FactorOptions& options,
                   at::Tensor& workspace, Function report) {
  std::vector<size_t> local;
  local.reserve(tasks.size() / 2);
  for (size_t i = 0; i < tasks.size(); i += 2) {
    if (has_local_products(tasks[i].layout) && has_local_products(tasks[i + 1].layout)) {
      local.push_back(i / 2);
    } else {
      WholeFactors(workspace, options).run(tasks[i], tasks[i + 1]);
    }
  }
  LocalFactors(workspace, options).run(tasks, std::move(local));
  for (size_t i = 0; i < tasks.size(); i += 2) report(i / 2, outcome_of(tasks[i], tasks[i + 1]));
}

void update_factors_(at::TensorList K, at::TensorList C, at::TensorList m_K, at::TensorList m_C,
                     at::TensorList rejected, at::TensorList statistic_K,
                     at::TensorList statistic_C, at::ArrayRef<double> scale_K,
                     at::ArrayRef<double> scale_C, at::IntArrayRef dim_K, at::IntArrayRef dim_C,
                     const std::string& structure_K, const std::string& structure_C,
                     const at::Tensor& lr_cov, double damping, double alpha1, bool kfac_like,
                     bool normalize_lr_cov, int64_t expm_order, double step_cap,
                     at::Tensor& outcomes, at::Tensor& workspace,
                     const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf,
                     std::optional<at::IntArrayRef> rounding) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const FactorLists lists{K,       C,       m_K,   m_C,   rejected,    statistic_K, statistic_C,
                          scale_K, scale_C, dim_K, dim_C, structure_K, structure_C};
  const bool has_momenta = alpha1 != 0;
  check_factor_lists(kOp, lists, has_momenta, outcomes.device());
  check_outcomes(kOp, outcomes, K.size());
  check_factor_options(kOp, expm_order, step_cap);
  const FactorOptions options{checked_scalar(kOp, "lr_cov", lr_cov),
                              damping,
                              alpha1,
                              step_cap,
                              kfac_like,
                              normalize_lr_cov,
                              expm_order};
  const Scaler scaler = checked_scaler(kOp, grad_scale, found_inf);
  const RoundingKey key = checked_rounding_key(kOp, rounding);

  check_on_device(kOp, "workspace", workspace, outcomes.device());
  outcomes.zero_();
  if (scaler.found_inf) return;
  std::vector<FactorTask> tasks;
  tasks.reserve(2 * K.size());
  for (size_t i = 0; i < K.size(); ++i) {
    const RoundingKey layer_key = key.stream(i);
    tasks.push_back(make_task(K[i], has_momenta ? &m_K[i] : nullptr, statistic_K[i], scale_K[i],
                              dim_K[i], structure_K, layer_key.stream(0)));
    tasks.push_back(make_task(C[i], has_momenta ? &m_C[i] : nullptr, statistic_C[i],
                              scale_C[i] * scaler.unscale * scaler.unscale, dim_C[i], structure_C,
                              layer_key.stream(1)));
  }
  update_layers(tasks, options, workspace, [&](size_t i, Outcome outcome) {
    outcomes.mutable_data_ptr<int64_t>()[i] = outcome;
    if (outcome == kRejected) rejected[i].add_(1);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(singd_ext, CPU, m) { m.impl("update_factors_", update_factors_); }

}  // namespace singd::cpu
