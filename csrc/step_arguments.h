// What the operators of a step take: lists with an entry a layer, collected from the parameters and
// the optimizer's state and handed on without Python's code on the way.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "known_layer.h"
#include "operators.h"

namespace singd {

using KnownLayers = std::vector<std::shared_ptr<KnownLayer>>;

// The layers of a call, all of one parameter group, and their factors.
struct LayerLists {
  std::shared_ptr<const Operators> operators;
  KnownLayers layers;
  std::vector<at::Tensor> K, C;

  explicit LayerLists(std::shared_ptr<const Operators> called) : operators(std::move(called)) {}
  int64_t count() const { return static_cast<int64_t>(layers.size()); }
  // Where they are.
  c10::Device device() const { return layers.empty() ? c10::kCPU : K.front().device(); }
};

// The lists of `update_factors_`, of layers that have statistics.
struct FactorArguments : LayerLists {
  std::vector<std::string> unseen;  // names of the layers that have none
  std::vector<at::Tensor> m_K, m_C, rejected, statistic_K, statistic_C;
  std::vector<double> scale_K, scale_C;
  std::vector<int64_t> dim_K, dim_C;
  KnownLayers all;  // also those without statistics

  using LayerLists::LayerLists;
  void add(const std::shared_ptr<KnownLayer>& layer, bool has_momenta);
  // For so many layers.
  void reserve(size_t count);
  // Lets all tensors go, while a cache has them, and the statistics from the state too.
  void release();
};

// The lists of `preconditioned_update_`, of layers that have a gradient.
struct StepArguments : LayerLists {
  FactorArguments factors;  // none, if these are not due
  std::vector<at::Tensor> weight, bias, momentum_weight, momentum_bias, skipped, grad_weight,
      grad_bias;
  std::vector<int64_t> copied;  // of the layers, those whose weight is to be written back

  explicit StepArguments(const std::shared_ptr<const Operators>& called)
      : LayerLists(called), factors(called) {}
  // For so many layers.
  void reserve(size_t count);
  // Not without a gradient. Throws if the gradients are not what a step needs.
  void add(const std::shared_ptr<KnownLayer>& layer, bool has_momenta);
  // Those of one layer.
  StepArguments of_layer(size_t index) const;
};

// Whether no parameter of the layer has a gradient.
bool is_unused(const KnownLayer& layer);

// Adds these classes and KnownFactors to the module.
void define_step_arguments(pybind11::module_& m);

}  // namespace singd
