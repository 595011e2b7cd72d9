#include "known_layer.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "structures/spec.h"

namespace py = pybind11;

namespace singd {
namespace {

std::vector<WeakTensor> weak(const std::vector<at::Tensor>& tensors) {
  return {tensors.begin(), tensors.end()};
}

std::vector<py::object> roles_in(const py::object& layer) {
  std::vector<py::object> roles;
  for (const char* role : {"weight", "bias"}) {
    if (!layer.attr(role).is_none()) roles.push_back(interned(role));
  }
  return roles;
}

std::vector<WeakReference> modules_in(const py::object& layer) {
  std::vector<WeakReference> modules;
  if (!layer.attr("holds_parameters").cast<bool>()) return modules;
  for (const py::handle module : layer.attr("modules")) {
    modules.emplace_back(py::reinterpret_borrow<py::object>(module));
  }
  return modules;
}

}  // namespace

py::object interned(const std::string& key) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(key.c_str()));
}

Keys::Keys(const std::string& prefix)
    : K(interned(prefix + "K")),
      C(interned(prefix + "C")),
      m_K(interned(prefix + "m_K")),
      m_C(interned(prefix + "m_C")),
      rejected(interned(prefix + "rejected")),
      skipped(interned(prefix + "skipped")),
      statistic_K(interned(prefix + "statistic_K")),
      statistic_C(interned(prefix + "statistic_C")),
      rows(interned(prefix + "rows")),
      loss_terms(interned(prefix + "loss_terms")),
      momentum_buffer(interned("momentum_buffer")) {}

KnownLayer::KnownLayer(const py::object& layer, std::string of_K, std::string of_C, bool linear)
    : python(layer),
      name(layer.attr("name").cast<std::string>()),
      group(layer.attr("group").cast<int>()),
      parameters(weak(layer.attr("parameters").cast<std::vector<at::Tensor>>())),
      roles(roles_in(layer)),
      modules(modules_in(layer)),
      keys(layer.attr("kind").attr("prefix").cast<std::string>()),
      dim_K(layer.attr("dim_K").cast<int64_t>()),
      dim_C(layer.attr("dim_C").cast<int64_t>()),
      structure_K(std::move(of_K)),
      structure_C(std::move(of_C)),
      is_dense_K(is_dense(structure_K, dim_K)),
      is_dense_C(is_dense(structure_C, dim_C)),
      has_bias(!layer.attr("bias").is_none()),
      is_plain(layer.attr("is_plain").cast<bool>()),
      is_copied(layer.attr("is_copied").cast<bool>()),
      is_linear(linear),
      dtype(layer.attr("home").cast<py::tuple>()[0].cast<at::ScalarType>()),
      device(layer.attr("home").cast<py::tuple>()[1].cast<c10::Device>()),
      positions(parameters.size()) {}

void KnownLayer::bind(StateFinder& finder) {
  const py::object before = states.empty() ? py::none() : py::object(entries());
  states.clear();
  for (size_t i = 0; i < parameters.size(); ++i) {
    states.push_back(finder.find(parameters[i].get(), positions[i]));
  }
  has_statistics |= !entries().is(before);
}

py::dict StateFinder::find(const at::Tensor& parameter, Py_ssize_t& at) {
  const py::object key = py::cast(parameter);
  PyObject *found = nullptr, *value = nullptr;
  Py_ssize_t next = at;
  if (PyDict_Next(states_.ptr(), &next, &found, &value) == 0 || found != key.ptr()) {
    const auto state = states_[key].cast<py::dict>();  // of a new parameter, an empty one
    at = position_of(key.ptr());
    return state;
  }
  last_ = next;
  return py::handle(value).cast<py::dict>();
}

Py_ssize_t StateFinder::position_of(const PyObject* key) {
  PyObject *found = nullptr, *value = nullptr;
  for (const Py_ssize_t begin : {last_, Py_ssize_t{0}}) {
    Py_ssize_t at = begin, next = begin;
    for (; PyDict_Next(states_.ptr(), &next, &found, &value) != 0; at = next) {
      if (found != key) continue;
      last_ = next;
      return at;
    }
  }
  return 0;
}

void KnownLayer::unbind() {
  states.clear();
  has_statistics = true;
}

void KnownLayer::forget_statistics() {
  for (const auto* key : {&keys.statistic_K, &keys.statistic_C, &keys.rows, &keys.loss_terms}) {
    if (find(entries(), *key)) PyDict_DelItem(entries().ptr(), key->ptr());
  }
  has_statistics = false;
}

bool KnownLayer::is_owned() const {
  for (const WeakReference& module : modules) {
    const py::dict own = parameters_of(module);
    for (size_t i = 0; i < parameters.size(); ++i) {
      const py::handle held = find(own, roles[i]);
      if (!held || !THPVariable_Check(held.ptr())) return false;
      if (!THPVariable_Unpack(held.ptr()).is_same(parameters[i].get())) return false;
    }
  }
  return !modules.empty();
}

bool is_dense(const std::string& structure, int64_t dim) {
  return make_layout(structure, dim).family == Family::kDense;
}

py::dict attributes_of(const WeakReference& module) {
  static const py::object* const attributes = new py::object(interned("__dict__"));
  return py::getattr(module.get(), *attributes);
}

py::dict parameters_of(const WeakReference& module) {
  static const py::object* const own_parameters = new py::object(interned("_parameters"));
  return py::getattr(module.get(), *own_parameters);
}

py::handle find(const py::dict& state, const py::object& key) {
  return PyDict_GetItemWithError(state.ptr(), key.ptr());
}

int64_t number_in(const py::dict& state, const py::object& key) {
  const py::handle number = find(state, key);
  return number ? number.cast<int64_t>() : 0;
}

at::Tensor tensor_in(const KnownLayer& layer, const py::dict& state, const py::object& key) {
  const py::handle value = find(state, key);
  if (value && THPVariable_Check(value.ptr())) return THPVariable_Unpack(value.ptr());
  throw py::key_error("the optimizer's state of layer '" + layer.name + "' has no tensor '" +
                      key.cast<std::string>() +
                      "': something removed it; load a saved state, or construct SINGD again");
}

}  // namespace singd
