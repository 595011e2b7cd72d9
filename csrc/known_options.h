// The options of a parameter group as Python last checked them, so that a backward pass and a step
// see without Python's code whether anything was changed.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace singd {

class KnownOptions {
 public:
  // Of these values, which Python holds on to.
  KnownOptions(const pybind11::dict& group, const pybind11::dict& options, bool may_change_in_place)
      : reduce(options["kfac_approx"].cast<std::string>() == "reduce"),
        loss_average(options["loss_average"].cast<std::optional<std::string>>().value_or("")),
        has_momenta(options["momentum"].cast<double>() != 0),
        has_factor_momenta(options["alpha1"].cast<double>() != 0),
        may_change_in_place(may_change_in_place) {
    for (const auto& [key, value] : group) {
      if (!options.contains(key)) continue;
      entries_.emplace_back(pybind11::reinterpret_borrow<pybind11::object>(key), value.ptr());
    }
  }

  bool reduce;               // KFAC-reduce
  std::string loss_average;  // empty for a sum
  bool has_momenta, has_factor_momenta;
  bool may_change_in_place;  // numbers in tensors, which Python has to look at

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
  std::vector<std::pair<pybind11::object, const PyObject*>> entries_;
};

}  // namespace singd
