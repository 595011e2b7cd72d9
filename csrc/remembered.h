// Memory that a step looks through before its kernels run: objects of Python's and of torch's, here
// and there, which the backward pass has driven from the caches. Asked for at once they are there
// sooner than one after the other.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "group_step.h"

namespace singd {

// Where that memory was in the last step. Addresses are asked for, never followed: what is gone by
// then is asked for in vain.
class Remembered {
 public:
  // Asks for it: a backward pass begins, or a step.
  void ask() {
    for (const char* line : lines_) __builtin_prefetch(line);
    is_of_last_step_ = true;
  }

  // Adds what a step looks through, and forgets the last one.
  void add(const GroupStep& a) {
    if (std::exchange(is_of_last_step_, false)) lines_.clear();
    for (const auto& layer : a.layers) {
      note(layer.get(), sizeof(KnownLayer));
      note(layer->parameters.data(), kLine);
      note(layer->states.data(), kLine);
      for (const WeakTensor& parameter : layer->parameters) note(parameter.get());
      for (const pybind11::dict& state : layer->states) note(state);
      if (a.lr_cov.has_value()) note_factor_update(*layer);
    }
    for (const auto* list : {&a.K, &a.C, &a.skipped, &a.momentum_weight, &a.momentum_bias}) {
      for (const at::Tensor& tensor : *list) note(tensor);
    }
  }

 private:
  static constexpr std::size_t kLine = 64, kEntries = 6 * kLine;  // of a cache, of a dictionary

  // What is looked at only then: who owns the parameters, and the rest of the state.
  void note_factor_update(const KnownLayer& layer) {
    for (const WeakReference& module : layer.modules) {
      note(attributes_of(module));
      note(parameters_of(module));
    }
    for (const auto* key : {&layer.keys.m_K, &layer.keys.m_C, &layer.keys.rejected}) {
      const pybind11::handle entry = find(layer.entries(), *key);
      if (entry && THPVariable_Check(entry.ptr())) note(THPVariable_Unpack(entry.ptr()));
    }
  }

  void note(const void* object, std::size_t bytes) {
    const char* begin = static_cast<const char*>(object);
    for (std::size_t at = 0; at < bytes; at += kLine) lines_.push_back(begin + at);
  }
  void note(const at::Tensor& tensor) {
    note(tensor.unsafeGetTensorImpl(), sizeof(at::TensorImpl));
    if (tensor.has_storage()) note(tensor.storage().unsafeGetStorageImpl(), kLine);
    note(pybind11::cast(tensor).ptr(), kLine);
  }
  void note(const pybind11::dict& state) {
    note(state.ptr(), kLine);
    note(reinterpret_cast<const PyDictObject*>(state.ptr())->ma_keys, kEntries);
  }

  std::vector<const char*> lines_;
  bool is_of_last_step_ = false;
};

}  // namespace singd
