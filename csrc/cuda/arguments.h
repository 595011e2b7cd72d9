// Arguments of the torch-free entry points that launchers call.
#pragma once

#include "dtype.h"

struct CUstream_st;

namespace singd {

using Stream = CUstream_st*;  // cudaStream_t

// A number that is known to the host, or lies on the device, where only kernels read it.
struct Scalar {
  double value = 0;
  const void* pointer = nullptr;
  Dtype dtype = Dtype::kFloat64;
};

}  // namespace singd
