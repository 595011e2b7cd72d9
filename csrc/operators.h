// The operators that an optimizer calls, of one namespace: those of the emulator, in its tests.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>

namespace singd {

struct Operators {
  c10::TypedOperatorHandle<void(at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                                const std::string&, bool, const std::string&, bool)>
      accumulate_statistic_;
  c10::TypedOperatorHandle<void(
      at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
      at::TensorList, at::TensorList, at::ArrayRef<double>, at::ArrayRef<double>, at::IntArrayRef,
      at::IntArrayRef, const std::string&, const std::string&, const at::Tensor&, double, double,
      bool, bool, int64_t, double, at::Tensor&, at::Tensor&, const std::optional<at::Tensor>&,
      const std::optional<at::Tensor>&, std::optional<at::IntArrayRef>)>
      update_factors_;
  c10::TypedOperatorHandle<void(
      at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
      at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
      at::TensorList, const std::string&, const std::string&, const at::Tensor&, double, double,
      at::Tensor&, at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
      const std::optional<at::Tensor>&, std::optional<at::IntArrayRef>)>
      preconditioned_update_;

  explicit Operators(const std::string& name_space)
      : accumulate_statistic_(found(name_space + "::accumulate_statistic_")),
        update_factors_(found(name_space + "::update_factors_")),
        preconditioned_update_(found(name_space + "::preconditioned_update_")) {}

 private:
  // Of whatever signature is asked for, which the dispatcher checks.
  struct Found {
    c10::OperatorHandle handle;
    template <class Signature>
    operator c10::TypedOperatorHandle<Signature>() const {
      return handle.typed<Signature>();
    }
  };
  static Found found(const std::string& name) {
    return {c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "")};
  }
};

}  // namespace singd
