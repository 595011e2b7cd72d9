// What Python asks of the extension that is not a tensor operator: layouts, build information, and
// the observation of layers.
// Importing this module also registers the operators (schemas.cpp and the kernels beside it).
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "build_info.h"
#include "cpu/aten_product.h"
#include "cpu/kernels.h"
#include "gatherer.h"
#include "group_step.h"
#include "observation.h"
#include "structures/spec.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of singd_ext.";
  m.def("canonical_spec", &singd::canonical_spec, py::arg("spec"));
  m.def(
      "storage_size",
      [](const std::string& spec, int64_t dim) {
        return singd::storage_size(singd::make_layout(spec, dim));
      },
      py::arg("spec"), py::arg("dim"));
  m.def(
      "storage_sections",
      [](const std::string& spec, int64_t dim) {
        py::list sections;
        for (const auto& part : singd::storage_sections(singd::make_layout(spec, dim))) {
          sections.append(py::make_tuple(part.name, part.offset, py::tuple(py::cast(part.shape))));
        }
        return sections;
      },
      py::arg("spec"), py::arg("dim"));
  m.def(
      "diagonal_slots",
      [](const std::string& spec, int64_t dim) {
        return singd::diagonal_slots(singd::make_layout(spec, dim));
      },
      py::arg("spec"), py::arg("dim"));
  m.def("build_info", &singd::build_info);
  m.def("cpu_instructions", [] { return singd::cpu::kernels().name; });
  m.def("cpu_bfloat16_instructions", [] { return singd::cpu::bfloat16_step() != nullptr; });
  m.def("cpu_bfloat16_gram", [] { return singd::cpu::bfloat16_gram_rows() != nullptr; });
  m.def("cpu_tiles", [] { return singd::cpu::tile_step() != nullptr; });
  m.def("cpu_onednn_products",
        [] { return singd::cpu::multiplies_in_onednn(at::kFloat, INT64_MAX); });
  m.def("cpu_threads", &singd::cpu::threads);
  m.def("cpu_times_its_transpose", &singd::cpu::times_its_transpose, py::arg("square"));
  // Whether a profiler, or anything else, records what runs.
  m.def("is_recording", &at::hasCallbacks);
  singd::define_observation(m);
  singd::define_group_step(m);
  singd::define_gatherer(m);
}
