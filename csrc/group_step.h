// A parameter group's step, without Python's code on the way: what its operators take, collected
// from the parameters, the optimizer's state and its options, and their calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "call_memory.h"
#include "known_layer.h"
#include "known_options.h"
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
  std::vector<std::string> missed;  // and of those that only steps between updates use
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

// What a group has from step to step.
struct KnownGroup {
  std::shared_ptr<const KnownOptions> options;
  std::shared_ptr<CallMemory> memory = std::make_shared<CallMemory>();
  std::optional<bool> marked_due;           // whether compiled models are observed
  std::vector<const PyObject*> parameters;  // by which the group is told from others
};

// The step of the layers that have a gradient, checked before anything is changed. Its lists are
// those of `preconditioned_update_`.
struct GroupStep : LayerLists {
  int group;                     // its index
  int64_t number;                // of the step
  std::optional<double> lr_cov;  // beta1; none if the factors are not due
  std::shared_ptr<const KnownOptions> options;
  std::shared_ptr<CallMemory> memory;
  FactorArguments factors;  // none, if these are not due
  std::vector<at::Tensor> weight, bias, momentum_weight, momentum_bias, skipped, grad_weight,
      grad_bias;
  std::vector<int64_t> copied;     // of the layers, those whose weight is to be written back
  bool has_dense_factors = false;  // K K^T or C C^T may be kept

  GroupStep(const std::shared_ptr<const Operators>& called, int index, const KnownGroup& known,
            int64_t count)
      : LayerLists(called),
        group(index),
        number(count),
        options(known.options),
        memory(known.memory),
        factors(called) {}
  // For so many layers.
  void reserve(size_t count);
  // Not without a gradient. Throws if the gradients are not what a step needs.
  void add(const std::shared_ptr<KnownLayer>& layer);
  // That of one layer.
  GroupStep of_layer(size_t index) const;

  // Outcomes and the names of layers unseen and missed, if there is anything to report.
  using Names = std::vector<std::string>;
  using FactorReport = std::optional<std::tuple<at::Tensor, Names, Names>>;
  using Scale = std::optional<at::Tensor>;

  // Updates K, C, m_K and m_C from the layers' statistics, which are forgotten.
  FactorReport update_factors(const Scale& grad_scale, const Scale& found_inf);
  // Updates weights, biases and their momenta. The outcomes, if there is anything to report.
  std::optional<at::Tensor> update_parameters(const std::vector<at::Tensor>& P_K,
                                              const std::vector<at::Tensor>& P_C,
                                              const Scale& grad_scale,
                                              const Scale& found_inf) const;

 private:
  std::optional<std::vector<int64_t>> rounding_key(uint64_t stream) const;

  // Of random bits: those of factors, of all layers' parameters, and of those of single layers.
  static constexpr uint64_t kFactorBits = 0, kParameterBits = 1, kLayerBits = 2;
  uint64_t parameter_bits_ = kParameterBits;
};

// How many of a layer's parameters have a gradient.
size_t count_gradients(const KnownLayer& layer);

// Adds these classes and KnownFactors to the module.
void define_group_step(pybind11::module_& m);

}  // namespace singd
