// Fibers: stacks of their own that hand the processor to one another, within one operating-system
// thread.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace singd::emulation {

struct Fiber {
#if defined(__x86_64__) || defined(__aarch64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  // The stack's lowest address and size (for AddressSanitizer; of the main fiber it is learned).
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// Stacks with a guard page below each, kept for reuse.
class StackPool {
 public:
  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool();
  // Gives the fiber stack `index` and has it begin with entry(), which must not return.
  void prepare(Fiber& fiber, size_t index, void (*entry)());

 private:
  std::vector<char*> stacks_;
};

// Saves the running fiber in `from` and goes on with `to`; returns when something switches to
// `from` again.
void switch_fiber(Fiber& from, Fiber& to);

// To be called first by a fiber's entry().
void fiber_entered();

}  // namespace singd::emulation
