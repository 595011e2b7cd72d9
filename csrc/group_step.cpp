#include "group_step.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <variant>

#include "structures/rounding.h"

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

// Checks that W still has the size that the factors are of.
void check_size(const KnownLayer& layer, const at::Tensor& weight, const at::Tensor& bias) {
  const int64_t rows = layer.dim_C, columns = layer.dim_K;
  const int64_t biases = bias.numel(), weights = rows * columns - biases;
  const bool fits = weight.numel() == weights && (biases == 0 || biases == rows);
  if (fits && (weight.dim() != 2 || weight.size(0) == rows)) return;
  std::ostringstream message;
  message << "a parameter of layer '" << layer.name << "' has another shape than when SINGD was "
          << "constructed, when weight and bias made a matrix of " << rows << " x " << columns
          << ": construct SINGD again";
  throw py::value_error(message.str());
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

GroupStep::FactorReport GroupStep::update_factors(const Scale& grad_scale, const Scale& found_inf) {
  FactorArguments& a = factors;
  const KnownOptions& o = *options;
  const auto device = a.device();
  const auto key = rounding_key(kFactorBits);
  at::Tensor& outcomes = memory->factor_outcomes.of(a.count(), device);
  if (!a.layers.empty()) {
    const KnownLayer& any = *a.layers.front();  // all have the group's structures
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView guard;
    a.operators->update_factors_.call(
        a.K, a.C, a.m_K, a.m_C, a.rejected, a.statistic_K, a.statistic_C, a.scale_K, a.scale_C,
        a.dim_K, a.dim_C, any.structure_K, any.structure_C, memory->lr_cov.set(lr_cov.value()),
        o.damping, o.alpha1, o.kfac_like, o.normalize_lr_cov, o.expm_order, o.step_cap, outcomes,
        memory->workspace.on(device), grad_scale, found_inf, array(key));
  }
  note_changes({&a.K, &a.C, &a.m_K, &a.m_C});
  a.release();
  if (a.unseen.empty() && a.missed.empty() && are_uneventful(outcomes)) return std::nullopt;
  return FactorReport({outcomes, a.unseen, a.missed});
}

std::optional<at::Tensor> GroupStep::update_parameters(const std::vector<at::Tensor>& P_K,
                                                       const std::vector<at::Tensor>& P_C,
                                                       const Scale& grad_scale,
                                                       const Scale& found_inf) const {
  if (layers.empty()) return std::nullopt;
  const KnownLayer& any = *layers.front();  // all have the group's structures
  const KnownOptions& o = *options;
  const auto here = device();
  const auto key = rounding_key(parameter_bits_);
  at::Tensor& outcomes = memory->parameter_outcomes.of(count(), here);
  std::optional<at::Tensor> products;
  // With T = 1 none is of use in the next step, and a backward pass has other uses for memory.
  if (o.T > 1) products = memory->products_of(K, C, here);
  const auto* lr = std::get_if<double>(&o.lr);
  {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView guard;
    operators->preconditioned_update_.call(
        weight, bias, momentum_weight, momentum_bias, skipped, grad_weight, grad_bias, K, C, P_K,
        P_C, any.structure_K, any.structure_C,
        lr != nullptr ? memory->lr.set(*lr) : std::get<at::Tensor>(o.lr), o.momentum,
        o.weight_decay, outcomes, memory->workspace.on(here), products, grad_scale, found_inf,
        array(key));
  }
  note_changes({&weight, &bias, &momentum_weight, &momentum_bias});
  if (are_uneventful(outcomes)) return std::nullopt;
  return outcomes;
}

// Groups have the same seed, if none was chosen, and calls count their layers from 0.
std::optional<std::vector<int64_t>> GroupStep::rounding_key(uint64_t stream) const {
  if (!options->seed) return std::nullopt;
  const RoundingKey key = RoundingKey::make(*options->seed, group).stream(stream);
  return std::vector<int64_t>{static_cast<int64_t>(key.bits), number};
}

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

size_t count_gradients(const KnownLayer& layer) {
  size_t count = 0;
  for (const WeakTensor& parameter : layer.parameters) {
    if (parameter.get().grad().defined()) ++count;
  }
  return count;
}

void GroupStep::reserve(size_t count) {
  layers.reserve(count);
  for (auto* list : {&K, &C, &weight, &bias, &momentum_weight, &momentum_bias, &skipped,
                     &grad_weight, &grad_bias}) {
    list->reserve(count);
  }
}

void GroupStep::add(const std::shared_ptr<KnownLayer>& layer) {
  const bool has_momenta = options->has_momenta();
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
  check_size(*layer, weight.back(), bias.back());
  add(gradients, grad_weight, grad_bias);
  if (has_momenta) add(momenta, momentum_weight, momentum_bias);
  K.push_back(tensor_in(*layer, layer->entries(), layer->keys.K));
  C.push_back(tensor_in(*layer, layer->entries(), layer->keys.C));
  skipped.push_back(tensor_in(*layer, layer->entries(), layer->keys.skipped));
  has_dense_factors |= layer->is_dense_K || layer->is_dense_C;
  layers.push_back(layer);
}

GroupStep GroupStep::of_layer(size_t index) const {
  GroupStep one(operators, group, {options, memory}, number);
  one.has_dense_factors = has_dense_factors;
  one.parameter_bits_ = kLayerBits + index;
  one.layers = {layers.at(index)};
  one.K = {K[index]};
  one.C = {C[index]};
  for (const auto list : {&GroupStep::weight, &GroupStep::bias, &GroupStep::momentum_weight,
                          &GroupStep::momentum_bias, &GroupStep::skipped, &GroupStep::grad_weight,
                          &GroupStep::grad_bias}) {
    if (!(this->*list).empty()) (one.*list).push_back((this->*list)[index]);
  }
  for (const int64_t i : copied) {
    if (i == static_cast<int64_t>(index)) one.copied.push_back(0);
  }
  return one;
}

void define_group_step(py::module_& m) {
  using torch::wrap_pybind_function;
  py::class_<KnownFactors>(m, "KnownFactors")
      .def(py::init<>())
      .def(
          "are",
          [](KnownFactors& self, const std::vector<at::Tensor>& factors) {
            return self.are(factors);
          },
          py::arg("factors"));
  py::class_<CallMemory, std::shared_ptr<CallMemory>>(m, "CallMemory")
      .def("tensors", &CallMemory::tensors);
  py::class_<LayerLists>(m, "LayerLists")
      .def("__len__", [](const LayerLists& a) { return a.layers.size(); })
      .def_property_readonly("layers", [](const LayerLists& a) { return python_layers(a.layers); })
      .def_readonly("K", &LayerLists::K)
      .def_readonly("C", &LayerLists::C);
  py::class_<FactorArguments, LayerLists>(m, "FactorArguments");
  py::class_<GroupStep, LayerLists>(m, "GroupStep")
      .def_readonly("weight", &GroupStep::weight)
      .def_readonly("momentum_weight", &GroupStep::momentum_weight)
      .def_property_readonly(
          "dense_K",
          [](const GroupStep& a) { return positions(a.layers, &KnownLayer::is_dense_K); })
      .def_property_readonly(
          "dense_C",
          [](const GroupStep& a) { return positions(a.layers, &KnownLayer::is_dense_C); })
      .def_readonly("copied", &GroupStep::copied)
      .def(
          "momentum_buffer",
          [](const GroupStep& a, size_t index) {
            const KnownLayer& layer = *a.layers.at(index);
            return tensor_in(layer, layer.entries(), layer.keys.momentum_buffer);
          },
          py::arg("index"))
      .def("of_layer", &GroupStep::of_layer, py::arg("index"))
      .def_readonly("factors", &GroupStep::factors)
      .def_readonly("group", &GroupStep::group)
      .def_property_readonly("factors_are_due",
                             [](const GroupStep& a) { return a.lr_cov.has_value(); })
      .def_property_readonly("is_bounded", [](const GroupStep& a) { return a.options->is_bounded; })
      .def_readonly("has_dense_factors", &GroupStep::has_dense_factors)
      .def_property_readonly("writes_back", [](const GroupStep& a) { return !a.copied.empty(); })
      // Positional: names of arguments take time in calls that nothing has warmed up.
      .def("update_factors", wrap_pybind_function(&GroupStep::update_factors))
      .def("update_parameters", wrap_pybind_function(&GroupStep::update_parameters));
}

}  // namespace singd
