// How a layer's input meets its output gradient, in eager models. See observation.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "python_references.h"

namespace singd {

// Takes what one call of a layer contributes. Graphs own receivers: these hold weakly whatever
// would be missed.
class Receiver {
 public:
  virtual ~Receiver() = default;
  // The input, the output gradient and the backward pass that they belong to; called with the GIL
  // and without grad mode.
  virtual void receive(const at::Tensor& x, const at::Tensor& g, int64_t backward_pass) = 0;
};

// Delivers x and the gradient of `output` when a backward pass comes by. Not `active`: only keeps x
// as an active call does.
void observe(const at::Tensor& output, const at::Tensor& x, std::shared_ptr<Receiver> receiver,
             bool active);

// Whether the running backward pass adds to the `grad` of any of these parameters.
bool accumulates(const std::vector<WeakTensor>& parameters);

// Adds `observe` to the module, for receivers in Python.
void define_observation(pybind11::module_& m);

}  // namespace singd
