// Gathers the curvature statistics of an optimizer's layers during backward passes (curvature.py),
// and then what a step of these layers takes (steps.py).
#pragma once

#include <pybind11/pybind11.h>

namespace singd {

// Adds the classes Gatherer and LayerReceiver, and what they share with Python, to the module.
void define_gatherer(pybind11::module_& m);

}  // namespace singd
