// Which kernels this processor runs, and in how many threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <atomic>
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

const GramKernels<float>* bfloat16_gram() {
#if defined(__x86_64__)
  static const bool has_products =
      &kernels() == &avx512::kernels && __builtin_cpu_supports("avx512bf16");
  if (has_products) return &avx512_bfloat16::kernels;
#endif
  return nullptr;
}

// Asked of the threads themselves: compiled without OpenMP, at::parallel_for is a plain loop.
int threads() {
  std::atomic<int> last{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    int seen = last;
    while (seen < at::get_thread_num() && !last.compare_exchange_weak(seen, at::get_thread_num())) {
    }
  });
  return last + 1;
}

}  // namespace singd::cpu
