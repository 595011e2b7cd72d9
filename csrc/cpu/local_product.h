// A factor with local products, and the memory of P = F F^T.
#pragma once

#include <cstdint>

#include "arena.h"
#include "kernels.h"

namespace singd::cpu {

// The factor: its storage of `size` numbers.
struct LocalFactor {
  LocalKind kind = LocalKind::kIdentity;
  Layout layout;
  ConstArray storage;
  int64_t size = 0;

  LocalFactor() = default;
  LocalFactor(const Layout& l, ConstArray numbers, int64_t count)
      : kind(kind_of(l)), layout(l), storage(numbers), size(count) {}

 private:
  static LocalKind kind_of(const Layout& layout) {
    switch (layout.family) {
      case Family::kDiagonal:
        return LocalKind::kDiagonal;
      case Family::kBlockDiagonal:
        return LocalKind::kBlocks;
      default:
        return layout.transposed ? LocalKind::kColumnBorder : LocalKind::kRowBorder;
    }
  }
};

// All arrays that P has, of the sizes that its kind and form ask for.
template <class T>
void allocate_product(LocalProduct<T>& product, Arena& arena) {
  const int64_t d = product.layout.dim, k = product.layout.block;
  // So that kept planes and pairs have another size than numbers, and do not pass for them.
  const int64_t behind = product.form == Form::kNumbers ? 0 : kTileDepth;
  if (product.kind == LocalKind::kDiagonal || product.has_border()) {
    product.diagonal = arena.take<T>(padded(d));
  }
  if (product.kind == LocalKind::kBlocks) {
    const auto area = [&](int64_t n) { return product.rows_of(n) * product.stride_of(n); };
    product.blocks = arena.take<T>(d / k * area(k) + area(d % k) + behind);
  }
  if (product.has_pairs()) product.outer = arena.take<T>(padded(d));
  if (product.has_border()) {
    // Squares of rows on tiles begin where a border ends: the last one may end behind the matrix.
    const int64_t b = product.border(), rows = product.rows_of(d) + product.overshoot();
    product.thin = arena.take<T>(rows * product.stride_of(b) + behind);
    product.wide = arena.take<T>(product.rows_of(b) * product.wide_stride() + behind);
  }
}

}  // namespace singd::cpu
