// Which kernels this processor runs, and in how many threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
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

namespace {

// oneDNN's variable, by which users keep AMX out of torch's products, holds here too.
bool tiles_are_wanted() {
  const char* name = std::getenv("ONEDNN_MAX_CPU_ISA");
  const std::string most = name == nullptr ? "" : name;
  return most.empty() || most == "DEFAULT" || most == "ALL" || most == "default" || most == "all" ||
         most.find("AMX") != std::string::npos || most.find("amx") != std::string::npos;
}

// Whether the processor has tiles of bfloat16 numbers, and the system lets this process use them,
// which it must be asked for: their state makes a thread's context larger.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kBoth = kBFloat16 | kTiles;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  return &kernels() == &avx512::kernels && __builtin_cpu_supports("avx512bf16") &&
         tiles_are_wanted() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 &&
         (d & kBoth) == kBoth && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool has_tiles() {
  static const bool allowed = may_use_tiles();
  return allowed;
}

}  // namespace

const StepKernels<float>* tile_step() {
#if defined(__x86_64__)
  if (has_tiles()) return &amx::step_kernels;
#endif
  return nullptr;
}

GramRows* tile_gram_rows() {
#if defined(__x86_64__)
  if (has_tiles()) return &amx::rows;
#endif
  return nullptr;
}

const GramKernels<float>* bfloat16_gram(int64_t width) {
#if defined(__x86_64__)
  static const bool has_products =
      &kernels() == &avx512::kernels && __builtin_cpu_supports("avx512bf16");
  // Intel's processors take twice as long for such an instruction as for one of float32 numbers.
  // What is left there is that one column at a time need not be converted.
  static const bool are_fast = !__builtin_cpu_is("intel");
  if (has_tiles() && fills_tiles(width)) return &amx::gram_kernels;
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
