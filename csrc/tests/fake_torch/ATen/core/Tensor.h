// What csrc/cpu/arena.h takes from a tensor of bytes. The memory is aligned as torch aligns it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>

namespace at {

class Tensor {
 public:
  int64_t numel() const { return size_; }

  void resize_(std::initializer_list<int64_t> sizes) {
    size_ = *sizes.begin();
    const std::size_t lines = static_cast<std::size_t>(size_) / sizeof(Line) + 1;
    memory_.reset(new Line[lines]);
    std::memset(memory_.get(), 0xff, lines * sizeof(Line));  // NaN, where nobody writes
  }

  template <class T>
  T* mutable_data_ptr() const {
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };

  int64_t size_ = 0;
  std::unique_ptr<Line[]> memory_;
};

}  // namespace at
