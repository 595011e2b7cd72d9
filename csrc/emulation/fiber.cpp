#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define SINGD_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SINGD_ASAN 1
#endif
#endif
#if defined(SINGD_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// singd_emulation_switch(void** save, void* load): pushes the registers that a call preserves,
// stores the stack pointer to *save, takes `load` as the stack pointer and pops.
#if defined(__x86_64__)
asm(R"(
.text
.hidden singd_emulation_switch
.globl singd_emulation_switch
.type singd_emulation_switch, @function
singd_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size singd_emulation_switch, .-singd_emulation_switch
)");
extern "C" void singd_emulation_switch(void** save, void* load);
#elif defined(__aarch64__)
asm(R"(
.text
.hidden singd_emulation_switch
.globl singd_emulation_switch
.type singd_emulation_switch, @function
singd_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size singd_emulation_switch, .-singd_emulation_switch
)");
extern "C" void singd_emulation_switch(void** save, void* load);
#endif

namespace singd::emulation {

namespace {

constexpr size_t kStackBytes = 256 * 1024;

Fiber* previous_fiber = nullptr;

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Registers as singd_emulation_switch pops them, the last of which is the address to go on at.
#if defined(__x86_64__)
void* first_frame(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top) - 8;  // rsp % 16 == 8 at entry, as after a call
  std::memset(sp, 0, 8 * sizeof(void*));
  sp[6] = reinterpret_cast<void*>(entry);
  return sp;
}
#elif defined(__aarch64__)
void* first_frame(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top) - 20;
  std::memset(sp, 0, 20 * sizeof(void*));
  sp[11] = reinterpret_cast<void*>(entry);
  return sp;
}
#endif

}  // namespace

StackPool::~StackPool() {
  for (char* stack : stacks_) munmap(stack - page_bytes(), kStackBytes + page_bytes());
}

void StackPool::prepare(Fiber& fiber, size_t index, void (*entry)()) {
  while (stacks_.size() <= index) {
    void* memory = mmap(nullptr, kStackBytes + page_bytes(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page_bytes(), PROT_NONE);
    stacks_.push_back(static_cast<char*>(memory) + page_bytes());
  }
  char* stack = stacks_[index];
#if defined(SINGD_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // frames that were left by a switch
#endif
  // Stacks begin at different places of a page: equal ones would compete for few cache lines.
  const size_t offset = (index % 31) * 128;
  fiber.stack = stack;
  fiber.stack_bytes = kStackBytes;
  fiber.fake_stack = nullptr;
#if defined(__x86_64__) || defined(__aarch64__)
  fiber.stack_pointer = first_frame(stack + kStackBytes - offset, entry);
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes - offset;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
  previous_fiber = &from;
#if defined(SINGD_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  singd_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(SINGD_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_entered() {
#if defined(SINGD_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &previous_fiber->stack, &previous_fiber->stack_bytes);
#endif
}

}  // namespace singd::emulation
