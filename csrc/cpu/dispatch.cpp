// Which kernels this processor runs, and in how many threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <initializer_list>
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

#if defined(__x86_64__)
// Whether oneDNN's variable, by which users keep torch from instructions, leaves those that a value
// with one of these names stands for.
bool onednn_may_use(std::initializer_list<const char*> names) {
  const char* value = std::getenv("ONEDNN_MAX_CPU_ISA");
  std::string most = value == nullptr ? "" : value;
  for (char& letter : most) letter = static_cast<char>(std::toupper(letter));
  if (most.empty() || most == "DEFAULT" || most == "ALL") return true;
  return std::any_of(names.begin(), names.end(),
                     [&](const char* name) { return most.find(name) != std::string::npos; });
}

bool has_bfloat16() {
  static const bool has = &kernels() == &avx512::kernels && __builtin_cpu_supports("avx512bf16") &&
                          onednn_may_use({"BF16", "FP16", "AMX", "AVX10"});
  return has;
}

// Intel's processors take twice as long for such a product as for one of float32 numbers.
bool has_fast_bfloat16() {
  static const bool has = has_bfloat16() && !__builtin_cpu_is("intel");
  return has;
}
#endif

// Whether the processor has tiles of bfloat16 numbers, and the system lets this process use them,
// which it must be asked for: their state makes a thread's context larger.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kBoth = kBFloat16 | kTiles;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_bfloat16() && onednn_may_use({"AMX"}) &&
         __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBoth) == kBoth &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
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

const StepKernels<float>* bfloat16_step() {
#if defined(__x86_64__)
  if (has_bfloat16()) return &avx512_bfloat16::step_kernels;
#endif
  return nullptr;
}

const GramKernels<float>* bfloat16_gram(int64_t width) {
#if defined(__x86_64__)
  if (has_tiles() && fills_tiles(width)) return &amx::gram_kernels;
  if (has_fast_bfloat16()) return &avx512_bfloat16::gram_kernels;
#endif
  return nullptr;
}

GramRows* bfloat16_gram_rows() {
#if defined(__x86_64__)
  if (has_tiles()) return &amx::rows;
  if (has_fast_bfloat16()) return &avx512_bfloat16::rows;
#endif
  return nullptr;
}

bool pairs_are_faster() {
#if defined(__x86_64__)
  return has_fast_bfloat16();
#else
  return false;
#endif
}

// Where it has AVX-512: MKL uses that on Intel's processors alone. With AVX2 they are as fast.
bool onednn_is_faster() {
#if defined(__x86_64__)
  static const bool is = __builtin_cpu_supports("avx512bw") && !__builtin_cpu_is("intel") &&
                         onednn_may_use({"AVX512", "AVX10"});
  return is;
#else
  return false;
#endif
}

// On Intel's processors asking for W and M made such a step slower (docs/cpu.md).
bool asking_pays() {
#if defined(__x86_64__)
  static const bool pays = !__builtin_cpu_is("intel");
  return pays;
#else
  return false;
#endif
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
