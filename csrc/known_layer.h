// What C++ knows of an optimizer's layers, so that it finds their tensors without Python's code on
// the way: it runs cold, between matrix products and after a backward pass.
//
// The tensors live in the optimizer's state, a dictionary a parameter, where checkpoints find them.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "python_references.h"

namespace singd {

// A key as Python's own code has it: comparing the two takes no look at their letters.
pybind11::object interned(const std::string& key);

// Keys of the entries in a layer's state.
struct Keys {
  pybind11::object K, C, m_K, m_C, rejected, skipped, statistic_K, statistic_C, rows, loss_terms;
  pybind11::object momentum_buffer;  // without the prefix: in the state of each parameter

  explicit Keys(const std::string& prefix);
};

// Finds the states of parameters in the optimizer's, which anyone may have exchanged.
class StateFinder {
 public:
  explicit StateFinder(pybind11::dict states) : states_(std::move(states)) {}

  // The state of a parameter, which most likely is still `at` where it was: a look there takes no
  // hash of a tensor, which is Python's code.
  pybind11::dict find(const at::Tensor& parameter, Py_ssize_t& at);

 private:
  // Where this key is, looking behind the last one that was found, then from the beginning.
  Py_ssize_t position_of(const PyObject* key);

  pybind11::dict states_;
  Py_ssize_t last_ = 0;
};

struct KnownLayer {
  WeakReference python;  // the Layer of layers.py
  std::string name;
  int group;
  std::vector<WeakTensor> parameters;
  std::vector<pybind11::object> roles;  // of the parameters: "weight", "bias"
  std::vector<WeakReference> modules;   // if these hold the parameters under these names
  Keys keys;
  int64_t dim_K, dim_C;
  std::string structure_K, structure_C;
  bool is_dense_K, is_dense_C;  // K, C is stored as a matrix
  bool has_bias;
  bool is_plain;         // the parameters are in W as they are; of others, Python makes the views
  bool is_copied;        // W holds a copy of the weight, to be written back
  bool is_linear;        // its rows are those of `linear_rows`; of others, Python makes them
  at::ScalarType dtype;  // of the parameters, as last seen
  c10::Device device;
  std::vector<pybind11::dict> states;  // of the parameters, while bound; the first has the entries
  std::vector<Py_ssize_t> positions;   // of these in the optimizer's state

  int64_t last_pass = -1;      // the backward pass that last added to the statistics
  int64_t counted_terms = 0;   // loss terms counted in it
  bool pass_counts = false;    // whether it adds to the layer's gradients
  bool has_statistics = true;  // unless they were forgotten and none were added since
  bool was_used = false;       // in a step since the last one that updated factors
  int missed_updates = 0;      // in a row, by a layer that was used between them

  // layer: the Layer.
  KnownLayer(const pybind11::object& layer, std::string structure_K, std::string structure_C,
             bool is_linear);

  // Finds the states of its parameters.
  void bind(StateFinder& finder);
  // Lets them go, since others take their place.
  void unbind();
  // Whether the modules are known to hold the parameters.
  bool is_owned() const;
  pybind11::dict& entries() { return states.at(0); }
  const pybind11::dict& entries() const { return states.at(0); }
  // Forgets what was gathered.
  void forget_statistics();
};

// The attributes of a module, and those parameters that are its own.
pybind11::dict attributes_of(const WeakReference& module);
pybind11::dict parameters_of(const WeakReference& module);

// Whether such a factor is stored as a matrix.
bool is_dense(const std::string& structure, int64_t dim);

// An entry, or null.
pybind11::handle find(const pybind11::dict& state, const pybind11::object& key);

// A number in a state, 0 if there is none.
int64_t number_in(const pybind11::dict& state, const pybind11::object& key);

// A tensor in one of a layer's states. Throws KeyError, naming the layer, if there is none.
at::Tensor tensor_in(const KnownLayer& layer, const pybind11::dict& state,
                     const pybind11::object& key);

}  // namespace singd
