// Dense factors and diagonal blocks that are wide enough for library products (ATen): a factor is
// a few batches of equal square matrices, one for a dense factor.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>

#include "../structures/layout.h"

namespace singd::cuda {

// Width from which on the library is used.
constexpr int64_t kWideBlock = 128;

inline bool is_wide(const Layout& layout) {
  if (layout.family == Family::kDense) return layout.dim >= kWideBlock;
  return layout.family == Family::kBlockDiagonal && layout.block >= kWideBlock;
}

// f(view) for every batch of blocks, where view(storage) is [count, width, width].
template <class Function>
void for_each_wide_batch(const Layout& layout, Function f) {
  const auto batch = [&](int64_t offset, int64_t count, int64_t width) {
    if (count * width == 0) return;
    f([=](const at::Tensor& storage) {
      return storage.narrow(0, offset, count * width * width).view({count, width, width});
    });
  };
  if (layout.family == Family::kDense) return batch(0, 1, layout.dim);
  const int64_t count = layout.dim / layout.block, width = layout.block;
  batch(0, count, width);
  batch(count * width * width, 1, layout.dim % width);
}

// c = A B, or A^T B.
inline void wide_product(const Layout& layout, const at::Tensor& a, bool transpose,
                         const at::Tensor& b, const at::Tensor& c) {
  for_each_wide_batch(layout, [&](auto view) {
    at::Tensor out = view(c);
    at::bmm_out(out, transpose ? view(a).transpose(1, 2) : view(a), view(b));
  });
}

// c = A + A A / 2.
inline void wide_square(const Layout& layout, const at::Tensor& a, const at::Tensor& c) {
  for_each_wide_batch(layout, [&](auto view) {
    at::Tensor out = view(c);
    at::baddbmm_out(out, view(a), view(a), view(a), 1, 0.5);
  });
}

}  // namespace singd::cuda
