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

const GramKernels<float>* bfloat16_gram(int64_t width) {
#if defined(__x86_64__)
  static const bool has_products =
      &kernels() == &avx512::kernels && __builtin_cpu_supports("avx512bf16");
  // Intel's processors take twice as long for such an instruction as for one of float32 numbers.
  // What is left there is that one column at a time need not be converted.
  static const bool are_fast = !__builtin_cpu_is("intel");
  if (has_products && (are_fast || width == 1)) return &avx512_bfloat16::kernels;
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
