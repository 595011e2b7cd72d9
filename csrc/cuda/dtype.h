// Element types by name, for arguments whose type is known only at run time.
#pragma once

#include <cstdint>

#include "../structures/layout.h"

namespace singd {

enum class Dtype : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

SINGD_HOST_DEVICE constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace singd
