// Hands out pieces of a call's workspace: a plan runs once to count, and again over the memory.
#pragma once

#include <ATen/core/Tensor.h>

#include "../kept_memory.h"

namespace singd::cpu {

class Arena {
 public:
  Arena() = default;  // counts only; its pieces are null
  explicit Arena(std::byte* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 64;
    auto* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  // The bytes that plan(arena) takes.
  template <class Plan>
  static int64_t size(Plan plan) {
    Arena count;
    plan(count);
    return count.used_;
  }

  // plan(arena) twice: with null pieces, and with pieces of `memory`, which is given the size that
  // they take. Returns whether it had that size.
  template <class Plan>
  static bool fit(at::Tensor& memory, Plan plan) {
    const int64_t size = Arena::size(plan);
    const bool fits = memory.numel() == size;
    if (!fits) resize_memory(memory, size);
    hand_out(memory, plan);
    return fits;
  }

  // The same, with memory that is enlarged where too small.
  template <class Plan>
  static void run(at::Tensor& workspace, Plan plan) {
    const int64_t size = Arena::size(plan);
    if (workspace.numel() < size) resize_memory(workspace, size);
    hand_out(workspace, plan);
  }

 private:
  template <class Plan>
  static void hand_out(at::Tensor& memory, Plan plan) {
    Arena arena(reinterpret_cast<std::byte*>(memory.mutable_data_ptr<uint8_t>()));
    plan(arena);
  }

  std::byte* memory_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace singd::cpu
