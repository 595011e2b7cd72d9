// The options of a parameter group as Python last checked them, so that a backward pass and a step
// see without Python's code whether anything was changed, and what the operators of a step take.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace singd {

class KnownOptions {
 public:
  // Of these values, which Python holds on to.
  KnownOptions(const pybind11::dict& group, const pybind11::dict& options)
      : reduce(options["kfac_approx"].cast<std::string>() == "reduce"),
        kfac_like(options["kfac_like"].cast<bool>()),
        normalize_lr_cov(options["normalize_lr_cov"].cast<bool>()),
        is_bounded(!options["max_update_norm"].is_none() || !options["kl_clip"].is_none()),
        loss_average(options["loss_average"].cast<std::optional<std::string>>().value_or("")),
        T(options["T"].cast<int64_t>()),
        expm_order(options["expm_order"].cast<int64_t>()),
        momentum(options["momentum"].cast<double>()),
        weight_decay(options["weight_decay"].cast<double>()),
        damping(options["damping"].cast<double>()),
        alpha1(options["alpha1"].cast<double>()),
        step_cap(options["step_cap"].cast<double>()) {
    const pybind11::object beta1 = options["lr_cov"], beta2 = options["lr"];
    if (is_tensor(beta2)) {
      lr = THPVariable_Unpack(beta2.ptr());
    } else {
      lr = beta2.cast<double>();
    }
    if (!is_tensor(beta1) && PyCallable_Check(beta1.ptr()) == 0) lr_cov = beta1.cast<double>();
    may_change_in_place = is_tensor(beta1) || is_tensor(beta2);
    if (options["stochastic_rounding"].cast<bool>()) seed = options["seed"].cast<int64_t>();
    for (const auto& [key, value] : group) {
      if (!options.contains(key)) continue;
      entries_.emplace_back(pybind11::reinterpret_borrow<pybind11::object>(key), value.ptr());
    }
  }

  bool reduce;  // KFAC-reduce
  bool kfac_like, normalize_lr_cov;
  bool is_bounded;           // the step has a bound, which Python's code finds
  std::string loss_average;  // empty for a sum
  int64_t T, expm_order;
  double momentum, weight_decay, damping, alpha1, step_cap;
  std::variant<at::Tensor, double> lr;
  std::optional<double> lr_cov;  // none where Python has to be asked in every step
  std::optional<int64_t> seed;   // of stochastic rounding
  bool may_change_in_place;      // numbers in tensors, which Python has to look at

  bool has_momenta() const { return momentum != 0; }
  bool has_factor_momenta() const { return alpha1 != 0; }

  // Whether a dictionary has the same ones, in their order: in one pass, without a look at a key's
  // or a value's memory. Where it says no, Python looks for what is different.
  bool are_in(const pybind11::dict& group) const {
    PyObject *key = nullptr, *value = nullptr;
    auto next = entries_.begin();
    for (Py_ssize_t at = 0;
         next != entries_.end() && PyDict_Next(group.ptr(), &at, &key, &value);) {
      if (key != next->first.ptr()) continue;
      if (value != next->second) return false;
      ++next;
    }
    return next == entries_.end();
  }

 private:
  static bool is_tensor(const pybind11::object& value) { return THPVariable_Check(value.ptr()); }

  std::vector<std::pair<pybind11::object, const PyObject*>> entries_;
};

}  // namespace singd
