#include "step_arguments.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>
#include <variant>

#include "call_memory.h"

namespace py = pybind11;

namespace singd {
namespace {

// Entries of a layer: of its one or two parameters.
using Pair = c10::SmallVector<at::Tensor, 2>;

// Checks that a parameter without gradient is one that was frozen after construction.
void check_frozen(const KnownLayer& layer, const Pair& parameters, const Pair& gradients) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!gradients[i].defined() && parameters[i].requires_grad()) {
      throw std::runtime_error("only one of weight and bias of layer '" + layer.name +
                               "' has a gradient; K belongs to both: freeze the other one with "
                               "requires_grad_(False)");
    }
  }
}

void check_dense(const KnownLayer& layer, const Pair& gradients) {
  for (const at::Tensor& gradient : gradients) {
    if (gradient.defined() && gradient.layout() != at::kStrided) {
      throw py::type_error("layer '" + layer.name + "' has a sparse gradient; use dense gradients");
    }
  }
}

// The layer's part of W of its first parameter and of its second, whose place an empty tensor
// holds. tensors: the parameters, their gradients or their momenta.
std::pair<at::Tensor, at::Tensor> parts(const KnownLayer& layer, Pair tensors) {
  static const at::Tensor* const none = new at::Tensor(at::empty({0}));
  if (!layer.is_plain) {
    const py::object python = layer.python.get();
    for (size_t i = 0; i < tensors.size(); ++i) {
      tensors[i] = python.attr("view")(i, tensors[i]).cast<at::Tensor>();
    }
  }
  return {tensors[0], tensors.size() > 1 ? tensors[1] : *none};
}

// As an operation of torch's would note it: autograd refuses to use what was saved before, and
// products that are kept from step to step are made again.
void note_changes(std::initializer_list<const std::vector<at::Tensor>*> lists) {
  for (const auto* list : lists) {
    for (const at::Tensor& tensor : *list) {
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
  }
}

std::optional<at::IntArrayRef> array(const std::optional<std::vector<int64_t>>& numbers) {
  return numbers ? std::optional<at::IntArrayRef>(*numbers) : std::nullopt;
}

// Whether all is well, as far as the host knows without waiting.
bool are_uneventful(const at::Tensor& outcomes) {
  if (!outcomes.is_cpu()) return false;
  const auto* codes = outcomes.const_data_ptr<int64_t>();
  return std::all_of(codes, codes + outcomes.numel(), [](int64_t code) { return code == 0; });
}

// Outcomes and the names of layers without statistics, if there is anything to report.
using FactorReport = std::optional<std::pair<at::Tensor, std::vector<std::string>>>;

FactorReport update_factors(StepArguments& step, CallMemory& memory, double lr_cov, double damping,
                            double alpha1, bool kfac_like, bool normalize_lr_cov,
                            int64_t expm_order, double step_cap,
                            const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf,
                            const std::optional<std::vector<int64_t>>& rounding_key) {
  FactorArguments& a = step.factors;
  const auto device = a.device();
  at::Tensor& outcomes = memory.factor_outcomes.of(a.count(), device);
  if (!a.layers.empty()) {
    const KnownLayer& any = *a.layers.front();  // all have the group's structures
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView guard;
    a.operators->update_factors_.call(
        a.K, a.C, a.m_K, a.m_C, a.rejected, a.statistic_K, a.statistic_C, a.scale_K, a.scale_C,
        a.dim_K, a.dim_C, any.structure_K, any.structure_C, memory.lr_cov.set(lr_cov), damping,
        alpha1, kfac_like, normalize_lr_cov, expm_order, step_cap, outcomes,
        memory.workspace.on(device), grad_scale, found_inf, array(rounding_key));
  }
  note_changes({&a.K, &a.C, &a.m_K, &a.m_C});
  a.release();
  if (a.unseen.empty() && are_uneventful(outcomes)) return std::nullopt;
  return FactorReport({outcomes, a.unseen});
}

// The outcomes, if there is anything to report.
std::optional<at::Tensor> preconditioned_update(
    const StepArguments& a, CallMemory& memory, const std::variant<at::Tensor, double>& lr,
    double momentum, double weight_decay, const std::vector<at::Tensor>& P_K,
    const std::vector<at::Tensor>& P_C, const std::optional<at::Tensor>& grad_scale,
    const std::optional<at::Tensor>& found_inf,
    const std::optional<std::vector<int64_t>>& rounding_key, bool keep_products) {
  if (a.layers.empty()) return std::nullopt;
  const KnownLayer& any = *a.layers.front();  // all have the group's structures
  const auto device = a.device();
  at::Tensor& outcomes = memory.parameter_outcomes.of(a.count(), device);
  std::optional<at::Tensor> products;
  if (keep_products) products = memory.products_of(a.K, a.C, device);
  const auto* number = std::get_if<double>(&lr);
  {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView guard;
    a.operators->preconditioned_update_.call(
        a.weight, a.bias, a.momentum_weight, a.momentum_bias, a.skipped, a.grad_weight, a.grad_bias,
        a.K, a.C, P_K, P_C, any.structure_K, any.structure_C,
        number != nullptr ? memory.lr.set(*number) : std::get<at::Tensor>(lr), momentum,
        weight_decay, outcomes, memory.workspace.on(device), products, grad_scale, found_inf,
        array(rounding_key));
  }
  note_changes({&a.weight, &a.bias, &a.momentum_weight, &a.momentum_bias});
  if (are_uneventful(outcomes)) return std::nullopt;
  return outcomes;
}

std::vector<py::object> python_layers(const KnownLayers& layers) {
  std::vector<py::object> result;
  for (const auto& layer : layers) result.push_back(layer->python.get());
  return result;
}

// Positions of the layers of which this is so.
std::vector<size_t> positions(const KnownLayers& layers, bool KnownLayer::* is_so) {
  std::vector<size_t> result;
  for (size_t i = 0; i < layers.size(); ++i) {
    if ((*layers[i]).*is_so) result.push_back(i);
  }
  return result;
}

}  // namespace

void FactorArguments::add(const std::shared_ptr<KnownLayer>& layer, bool has_momenta) {
  all.push_back(layer);
  const Keys& keys = layer->keys;
  const py::dict& own = layer->entries();
  if (!find(own, keys.rows)) return unseen.push_back(layer->name);
  const int64_t rows = number_in(own, keys.rows);
  if (rows == 0) return;
  const auto entry = [&](const py::object& key) { return tensor_in(*layer, own, key); };
  layers.push_back(layer);
  K.push_back(entry(keys.K));
  C.push_back(entry(keys.C));
  if (has_momenta) {
    m_K.push_back(entry(keys.m_K));
    m_C.push_back(entry(keys.m_C));
  }
  rejected.push_back(entry(keys.rejected));
  statistic_K.push_back(entry(keys.statistic_K));
  statistic_C.push_back(entry(keys.statistic_C));
  scale_K.push_back(1.0 / static_cast<double>(rows));
  scale_C.push_back(static_cast<double>(number_in(own, keys.loss_terms)));
  dim_K.push_back(layer->dim_K);
  dim_C.push_back(layer->dim_C);
}

void FactorArguments::reserve(size_t count) {
  layers.reserve(count);
  all.reserve(count);
  for (auto* list : {&K, &C, &m_K, &m_C, &rejected, &statistic_K, &statistic_C}) {
    list->reserve(count);
  }
}

// Here first: Python's object of a tensor that C++ holds too would be kept for it.
void FactorArguments::release() {
  for (auto* list : {&K, &C, &m_K, &m_C, &rejected, &statistic_K, &statistic_C}) list->clear();
  for (const auto& layer : all) layer->forget_statistics();
}

bool is_unused(const KnownLayer& layer) {
  for (const WeakTensor& parameter : layer.parameters) {
    if (parameter.get().grad().defined()) return false;
  }
  return true;
}

void StepArguments::reserve(size_t count) {
  layers.reserve(count);
  for (auto* list : {&K, &C, &weight, &bias, &momentum_weight, &momentum_bias, &skipped,
                     &grad_weight, &grad_bias}) {
    list->reserve(count);
  }
}

void StepArguments::add(const std::shared_ptr<KnownLayer>& layer, bool has_momenta) {
  Pair parameters, gradients, momenta;
  for (const WeakTensor& parameter : layer->parameters) {
    parameters.push_back(parameter.get());
    gradients.push_back(parameters.back().grad());
  }
  check_frozen(*layer, parameters, gradients);
  check_dense(*layer, gradients);
  for (size_t i = 0; i < parameters.size() && has_momenta; ++i) {
    momenta.push_back(tensor_in(*layer, layer->states.at(i), layer->keys.momentum_buffer));
  }
  if (layer->is_copied && gradients[0].defined()) {
    copied.push_back(static_cast<int64_t>(layers.size()));
  }
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i].defined()) continue;
    // A parameter that was frozen after construction has no gradient. It is part of W, with a
    // gradient of zero, and is kept: the operator gets a copy.
    gradients[i] = at::zeros_like(parameters[i]);
    parameters[i] = parameters[i].clone();
    if (has_momenta) momenta[i] = momenta[i].clone();
  }
  const auto add = [&](const Pair& pair, auto& first, auto& second) {
    auto [a, b] = parts(*layer, pair);
    first.push_back(std::move(a));
    second.push_back(std::move(b));
  };
  add(parameters, weight, bias);
  add(gradients, grad_weight, grad_bias);
  if (has_momenta) add(momenta, momentum_weight, momentum_bias);
  K.push_back(tensor_in(*layer, layer->entries(), layer->keys.K));
  C.push_back(tensor_in(*layer, layer->entries(), layer->keys.C));
  skipped.push_back(tensor_in(*layer, layer->entries(), layer->keys.skipped));
  layers.push_back(layer);
}

StepArguments StepArguments::of_layer(size_t index) const {
  StepArguments one(operators);
  one.layers = {layers.at(index)};
  one.K = {K[index]};
  one.C = {C[index]};
  for (const auto list :
       {&StepArguments::weight, &StepArguments::bias, &StepArguments::momentum_weight,
        &StepArguments::momentum_bias, &StepArguments::skipped, &StepArguments::grad_weight,
        &StepArguments::grad_bias}) {
    if (!(this->*list).empty()) (one.*list).push_back((this->*list)[index]);
  }
  for (const int64_t i : copied) {
    if (i == static_cast<int64_t>(index)) one.copied.push_back(0);
  }
  return one;
}

void define_step_arguments(py::module_& m) {
  using torch::wrap_pybind_function;
  py::class_<KnownFactors>(m, "KnownFactors")
      .def(py::init<>())
      .def(
          "are",
          [](KnownFactors& self, const std::vector<at::Tensor>& factors) {
            return self.are(factors);
          },
          py::arg("factors"));
  py::class_<CallMemory>(m, "CallMemory").def(py::init<>()).def("tensors", &CallMemory::tensors);
  py::class_<LayerLists>(m, "LayerLists")
      .def("__len__", [](const LayerLists& a) { return a.layers.size(); })
      .def_property_readonly("layers", [](const LayerLists& a) { return python_layers(a.layers); })
      .def_readonly("K", &LayerLists::K)
      .def_readonly("C", &LayerLists::C);
  py::class_<FactorArguments, LayerLists>(m, "FactorArguments");
  py::class_<StepArguments, LayerLists>(m, "StepArguments")
      .def_readonly("weight", &StepArguments::weight)
      .def_readonly("momentum_weight", &StepArguments::momentum_weight)
      .def_property_readonly(
          "dense_K",
          [](const StepArguments& a) { return positions(a.layers, &KnownLayer::is_dense_K); })
      .def_property_readonly(
          "dense_C",
          [](const StepArguments& a) { return positions(a.layers, &KnownLayer::is_dense_C); })
      .def_readonly("copied", &StepArguments::copied)
      .def(
          "momentum_buffer",
          [](const StepArguments& a, size_t index) {
            const KnownLayer& layer = *a.layers.at(index);
            return tensor_in(layer, layer.entries(), layer.keys.momentum_buffer);
          },
          py::arg("index"))
      .def("of_layer", &StepArguments::of_layer, py::arg("index"))
      .def_readonly("factors", &StepArguments::factors)
      // Positional: names of arguments take time in calls that nothing has warmed up.
      .def("update_factors_", wrap_pybind_function(update_factors))
      .def("preconditioned_update_", wrap_pybind_function(preconditioned_update));
}

}  // namespace singd
