// Weak references that C++ holds: a strong one from here would hide cycles from Python's collector.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SafePyObject.h>
#include <c10/util/intrusive_ptr.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/PyInterpreter.h>

namespace singd {

// A weak reference to a Python object, which any thread may drop.
class WeakReference {
 public:
  explicit WeakReference(const pybind11::object& object)
      : reference_(pybind11::weakref(object).release().ptr(), getPyInterpreter()) {}
  // The object, or None; with the GIL.
  pybind11::object get() const {
    auto* object = PyObject_CallNoArgs(reference_.ptr(getPyInterpreter()));
    if (object == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(object);
  }

 private:
  c10::SafePyObject reference_;
};

// A weak reference to a tensor.
class WeakTensor {
 public:
  explicit WeakTensor(const at::Tensor& tensor) : impl_(tensor.getIntrusivePtr()) {}
  // The tensor, or an undefined one.
  at::Tensor get() const { return at::Tensor(impl_.lock()); }

 private:
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> impl_;
};

}  // namespace singd
