// Python's hold on the emulator: the module singd_ext._emulation. Importing it also registers the
// operators of torch.ops.singd_emulated.
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "counters.h"
#include "emulator.h"

namespace py = pybind11;
using namespace singd::emulation;

namespace {

py::dict to_dict(const Counters& c) {
  py::dict widths;
  for (int i = 0; i < kWidths; ++i) widths[py::int_(1 << i)] = c.bytes_by_width[i];
  py::dict d;
  d["launches"] = c.launches;
  d["blocks"] = c.blocks;
  d["bytes_read"] = c.bytes_read;
  d["bytes_written"] = c.bytes_written;
  d["bytes_by_width"] = widths;
  d["sectors_read"] = c.sectors_read;
  d["sectors_written"] = c.sectors_written;
  d["least_sectors_read"] = c.least_sectors_read;
  d["least_sectors_written"] = c.least_sectors_written;
  d["dram_bytes_read"] = c.dram_bytes_read;
  d["dram_bytes_written"] = c.dram_bytes_written;
  d["atomics"] = c.atomics;
  d["shared_phases"] = c.shared_phases;
  d["bank_conflicts"] = c.bank_conflicts;
  return d;
}

py::dict stop() {
  py::dict result;
  Counters total;
  for (const auto& [kernel, counters] : stop_counting()) {
    result[py::str(kernel)] = to_dict(counters);
    total += counters;
  }
  result["total"] = to_dict(total);
  return result;
}

}  // namespace

PYBIND11_MODULE(_emulation, m) {
  m.doc() = "Runs the CUDA kernels on the CPU: the operators of torch.ops.singd_emulated.";
  m.def("set_seed", &set_seed, py::arg("seed"),
        "Let the threads of a block take turns in an order drawn from this seed; 0: in order.");
  m.def("set_random_blocks", &set_random_blocks, py::arg("random"),
        "Run the blocks of a grid in an order drawn from the seed, or in ascending order.");
  m.def("start_counting", &start_counting, py::arg("l2_bytes") = kDefaultL2Bytes,
        "Count launches and memory accesses from here on, with an empty L2 of this size.");
  m.def("stop_counting", &stop,
        "Stop counting and return the counts by kernel, with those of all kernels as 'total'.");
}
