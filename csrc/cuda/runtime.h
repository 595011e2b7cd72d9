// What launchers (the .cpp files of this folder) need beside ATen: stream, device guard, dtypes,
// scalars, and where operators are registered. The same launchers, compiled with SINGD_EMULATION,
// register the operators of the namespace singd_emulated for CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>
#include <string>

#include "../kept_memory.h"
#include "../op_checks.h"
#include "arguments.h"
#include "dtype.h"

#if defined(SINGD_EMULATION)
#define SINGD_LIBRARY singd_emulated
#define SINGD_CUDA_KEY CPU
#else
#define SINGD_LIBRARY singd_ext
#define SINGD_CUDA_KEY CUDA
#endif

namespace singd::cuda {

#if defined(SINGD_EMULATION)
constexpr c10::DeviceType kDeviceType = c10::kCPU;
#else
constexpr c10::DeviceType kDeviceType = c10::kCUDA;
#endif

inline Stream current_stream(const at::Tensor& tensor) {
#if defined(SINGD_EMULATION)
  (void)tensor;
  return nullptr;
#else
  const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
  return static_cast<Stream>(guard.getStream(tensor.device()).native_handle());
#endif
}

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "singd_ext: dtype ", type, " is not supported");
  }
}
inline Dtype dtype_of(const at::Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// A tensor of one number: by value if it lies on the host, for kernels to read otherwise.
inline Scalar scalar_argument(const char* op, const char* name, const at::Tensor& tensor,
                              const at::Device& device) {
  check_dtype(op, name, tensor);
  TORCH_CHECK_VALUE(tensor.numel() == 1, "singd_ext::", op, ": ", name,
                    " must hold one number, but has shape ", tensor.sizes());
  Scalar scalar;
  if (tensor.device() == device) {
    scalar.pointer = tensor.const_data_ptr();
    scalar.dtype = dtype_of(tensor);
  } else {
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), "singd_ext::", op, ": ", name, " is on ",
                      tensor.device(), ", but the operator runs on ", device);
    scalar.value = tensor.item().toDouble();
  }
  return scalar;
}
inline Scalar scalar_argument(const char* op, const char* name,
                              const std::optional<at::Tensor>& tensor, const at::Device& device,
                              double otherwise) {
  if (tensor.has_value()) return scalar_argument(op, name, *tensor, device);
  Scalar scalar;
  scalar.value = otherwise;
  return scalar;
}

// `bytes` of memory for the call, kept by the caller from step to step: it grows when too small.
inline void* workspace_of(at::Tensor& workspace, int64_t bytes) {
  if (workspace.numel() < bytes) resize_memory(workspace, bytes);
  return workspace.mutable_data_ptr();
}

// Runs what launches kernels; its errors name the operator and what it was given.
template <class Function>
void run(const char* op, const std::string& structure, at::IntArrayRef shape, Function&& f) {
  try {
    f();
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception& error) {
    TORCH_CHECK(false, "singd_ext::", op, " ('", structure, "', shape ", shape,
                "): ", error.what());
  }
}

}  // namespace singd::cuda
