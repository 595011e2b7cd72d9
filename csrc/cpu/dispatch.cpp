// Which kernels this processor runs.
#include <ATen/Version.h>

#include <string>

#include "kernels.h"

namespace singd::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return avx512::kernels;
    if (capability == "AVX2") return avx2::kernels;
#endif
    return plain::kernels;
  }();
  return chosen;
}

}  // namespace singd::cpu
