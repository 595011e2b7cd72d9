// How a layer's input meets its output gradient, in eager models. See observation.py.
#pragma once

#include <pybind11/pybind11.h>

namespace singd {

// Adds `observe` and `accumulates` to the module.
void define_observation(pybind11::module_& m);

}  // namespace singd
