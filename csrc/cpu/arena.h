// Hands out pieces of a call's workspace: a plan runs once to count, and again over the memory.
#pragma once

#include <ATen/core/Tensor.h>

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

  // plan(arena) twice: with null pieces, and with pieces of `workspace`, enlarged where too small.
  template <class Plan>
  static void run(at::Tensor& workspace, Plan plan) {
    Arena count;
    plan(count);
    if (workspace.numel() < count.used_) workspace.resize_({count.used_});
    Arena arena(workspace.mutable_data_ptr<uint8_t>());
    plan(arena);
  }

 private:
  explicit Arena(uint8_t* memory) : Arena(reinterpret_cast<std::byte*>(memory)) {}

  std::byte* memory_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace singd::cpu
