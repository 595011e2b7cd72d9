// Block-diagonal factors: floor(d / k) row-major k x k blocks, then the r x r remainder block.
// The statistic is the same blocks of U = X^T X.
#pragma once

#include "entrywise.h"

namespace singd {

struct BlockDiagonal : Entrywise<BlockDiagonal> {
  Layout layout;

  explicit BlockDiagonal(const Layout& l) : layout(l) {}

  int64_t size() const { return full_blocks() * layout.block * layout.block + rest() * rest(); }

  std::vector<Section> sections() const {
    const int64_t k = layout.block, q = full_blocks(), r = rest();
    std::vector<Section> parts = {{"blocks", 0, {q, k, k}}};
    if (r > 0) parts.push_back({"last_block", q * k * k, {r, r}});
    return parts;
  }

  template <class Function>
  void for_each_entry(Function f) const {
    for_each_group([&](Blocks blocks) {
      for (int64_t t = 0; t < blocks.count; ++t) {
        for (int64_t i = 0; i < blocks.width; ++i) {
          for (int64_t j = 0; j < blocks.width; ++j) {
            const int64_t start = blocks.start + t * blocks.width;
            const int64_t slot = blocks.offset + (t * blocks.width + i) * blocks.width + j;
            f(slot, start + i, start + j, 1);
          }
        }
      }
    });
  }

  template <class Math, class T>
  void conjugate(const T* k, const T* statistic, T* h) const {
    std::vector<T> uk(size());
    product<Math>(statistic, k, uk.data());
    transposed_product<Math>(k, uk.data(), h);
  }

  template <class Math, class T>
  void gram(const T* k, T* h) const {
    transposed_product<Math>(k, k, h);
  }

  template <class Math, class T>
  void product(const T* a, const T* b, T* c) const {
    for_each_group([&](Blocks g) {
      Math::multiply(g.width, g.width, g.width, in_storage(g, a), in_storage(g, b),
                     in_storage(g, c), g.count);
    });
  }

  template <class Math, class T>
  void multiply(const T* k, Side side, bool transpose, const T* x, T* y, int64_t other) const {
    for_each_group([&](Blocks b) {
      const auto factor = in_storage(b, k).transpose_if(transpose);
      if (side == Side::kLeft) {
        Math::multiply(b.width, other, b.width, factor, rows(b, x, other), rows(b, y, other),
                       b.count);
      } else {
        Math::multiply(other, b.width, b.width, columns(b, x, layout.dim), factor,
                       columns(b, y, layout.dim), b.count);
      }
    });
  }

 private:
  // Equal blocks side by side: the full ones, or the remainder.
  struct Blocks {
    int64_t count, width, start, offset;
  };

  int64_t full_blocks() const { return layout.dim / layout.block; }
  int64_t rest() const { return layout.dim % layout.block; }

  template <class Function>
  void for_each_group(Function f) const {
    const int64_t k = layout.block, q = full_blocks(), r = rest();
    f(Blocks{q, k, 0, 0});
    if (r > 0) f(Blocks{1, r, q * k, q * k * k});
  }

  // H = A^T B block by block.
  template <class Math, class T>
  void transposed_product(const T* a, const T* b, T* h) const {
    for_each_group([&](Blocks g) {
      Math::multiply(g.width, g.width, g.width, in_storage(g, a).transpose(), in_storage(g, b),
                     in_storage(g, h), g.count);
    });
  }

  template <class T>
  static MatrixView<T> in_storage(Blocks b, T* storage) {
    return {storage + b.offset, b.width, 1, b.width * b.width};
  }
  template <class T>
  static MatrixView<T> rows(Blocks b, T* x, int64_t row_stride) {
    return {x + b.start * row_stride, row_stride, 1, b.width * row_stride};
  }
  template <class T>
  static MatrixView<T> columns(Blocks b, T* x, int64_t row_stride) {
    return {x + b.start, row_stride, 1, b.width};
  }
};

}  // namespace singd
