// The entries of a structure in constant time and without memory, for kernels: which position a
// slot of the storage has, which slot a position, and the entries of a row or a column. Positions
// are those of the stored matrix R: R = K, or R = K^T where layout.transposed. The order and the
// weights are those of for_each_entry in the family headers; csrc/tests/test_pattern.cpp compares.
//
//   size()                          number of slots
//   position(slot)                  {i, j} of R
//   slot(i, j)                      -1 where the pattern is zero
//   weight(i, j)                    of the projection Pi, for a position in the pattern
//   column_length(j), column_row(j, n)      the rows of the entries of column j, n = 0, 1, ...
//   row_length(i), row_column(i, n)         the columns of the entries of row i
#pragma once

#include "layout.h"

namespace singd {

struct Position {
  int64_t row, column;
};

struct DensePattern {
  int64_t dim;
  Triangle triangle;

  SINGD_HOST_DEVICE explicit DensePattern(const Layout& l) : dim(l.dim), triangle(l.triangle) {}

  SINGD_HOST_DEVICE int64_t size() const { return dim * dim; }
  SINGD_HOST_DEVICE Position position(int64_t slot) const { return {slot / dim, slot % dim}; }
  SINGD_HOST_DEVICE int64_t slot(int64_t i, int64_t j) const {
    if (triangle == Triangle::kUpper && j < i) return -1;
    if (triangle == Triangle::kLower && j > i) return -1;
    return i * dim + j;
  }
  SINGD_HOST_DEVICE int weight(int64_t i, int64_t j) const {
    return triangle == Triangle::kFull || i == j ? 1 : 2;
  }
  SINGD_HOST_DEVICE int64_t column_length(int64_t j) const {
    if (triangle == Triangle::kUpper) return j + 1;
    return triangle == Triangle::kLower ? dim - j : dim;
  }
  SINGD_HOST_DEVICE int64_t column_row(int64_t j, int64_t n) const {
    return triangle == Triangle::kLower ? j + n : n;
  }
  SINGD_HOST_DEVICE int64_t row_length(int64_t i) const {
    if (triangle == Triangle::kLower) return i + 1;
    return triangle == Triangle::kUpper ? dim - i : dim;
  }
  SINGD_HOST_DEVICE int64_t row_column(int64_t i, int64_t n) const {
    return triangle == Triangle::kUpper ? i + n : n;
  }
};

// Diagonal factors have blocks of size 1.
struct BlockPattern {
  int64_t dim, block;

  SINGD_HOST_DEVICE explicit BlockPattern(const Layout& l)
      : dim(l.dim), block(l.family == Family::kDiagonal ? 1 : l.block) {}

  SINGD_HOST_DEVICE int64_t size() const {
    const int64_t rest = dim % block;
    return dim / block * block * block + rest * rest;
  }
  // The first index of the block that holds index i, and its width. Indices and blocks are below
  // 2^31: a GPU divides 64 bits several times more slowly.
  SINGD_HOST_DEVICE int64_t start(int64_t i) const {
    const uint32_t number = static_cast<uint32_t>(i) / static_cast<uint32_t>(block);
    return static_cast<int64_t>(number) * block;
  }
  SINGD_HOST_DEVICE int64_t width(int64_t i) const {
    const int64_t rest = dim - start(i);
    return rest < block ? rest : block;
  }
  SINGD_HOST_DEVICE Position position(int64_t slot) const {
    const int64_t first = slot / (block * block) * block, inside = slot % (block * block);
    const int64_t w = width(first);
    return {first + inside / w, first + inside % w};
  }
  SINGD_HOST_DEVICE int64_t slot(int64_t i, int64_t j) const {
    const int64_t first = start(i);
    if (start(j) != first) return -1;
    return first * block + (i - first) * width(i) + (j - first);
  }
  SINGD_HOST_DEVICE int weight(int64_t, int64_t) const { return 1; }
  SINGD_HOST_DEVICE int64_t column_length(int64_t j) const { return width(j); }
  SINGD_HOST_DEVICE int64_t column_row(int64_t j, int64_t n) const { return start(j) + n; }
  SINGD_HOST_DEVICE int64_t row_length(int64_t i) const { return width(i); }
  SINGD_HOST_DEVICE int64_t row_column(int64_t i, int64_t n) const { return start(i) + n; }
};

// R is dense in its border rows (the first `head`, the last `tail`) and diagonal elsewhere; its
// tail rows are zero in the head columns.
struct BorderedPattern {
  int64_t dim, head, tail;

  SINGD_HOST_DEVICE explicit BorderedPattern(const Layout& l)
      : dim(l.dim), head(l.head), tail(l.tail) {}

  SINGD_HOST_DEVICE int64_t border() const { return head + tail; }
  SINGD_HOST_DEVICE int64_t size() const { return border() * dim + dim - border(); }
  SINGD_HOST_DEVICE bool is_tail(int64_t i) const { return i >= dim - tail; }
  SINGD_HOST_DEVICE bool is_border(int64_t i) const { return i < head || is_tail(i); }
  // Border index r lies at row border_row(i) of the stored border, and the other way around.
  SINGD_HOST_DEVICE int64_t border_row(int64_t i) const {
    return i < head ? i : i - dim + border();
  }
  SINGD_HOST_DEVICE int64_t border_index(int64_t r) const {
    return r < head ? r : r + dim - border();
  }
  SINGD_HOST_DEVICE Position position(int64_t slot) const {
    if (slot < border() * dim) return {border_index(slot / dim), slot % dim};
    const int64_t i = slot - border() * dim + head;
    return {i, i};
  }
  // The zeros of tail rows in head columns have slots, but slot() does not return them.
  SINGD_HOST_DEVICE int64_t slot(int64_t i, int64_t j) const {
    if (!is_border(i)) return i == j ? border() * dim + i - head : -1;
    return is_tail(i) && j < head ? -1 : border_row(i) * dim + j;
  }
  SINGD_HOST_DEVICE int weight(int64_t i, int64_t j) const {
    if (i == j || (i < head && j < head) || (is_tail(i) && is_tail(j))) return 1;
    return 2;
  }
  SINGD_HOST_DEVICE int64_t column_length(int64_t j) const {
    return j < head ? head : border() + (is_tail(j) ? 0 : 1);
  }
  SINGD_HOST_DEVICE int64_t column_row(int64_t j, int64_t n) const {
    return n < border() ? border_index(n) : j;
  }
  SINGD_HOST_DEVICE int64_t row_length(int64_t i) const {
    if (!is_border(i)) return 1;
    return is_tail(i) ? dim - head : dim;
  }
  SINGD_HOST_DEVICE int64_t row_column(int64_t i, int64_t n) const {
    if (!is_border(i)) return i;
    return is_tail(i) ? head + n : n;
  }
};

// R is upper triangular; a slot stands for a whole diagonal, and its position is the first entry.
struct ToeplitzPattern {
  int64_t dim;

  SINGD_HOST_DEVICE explicit ToeplitzPattern(const Layout& l) : dim(l.dim) {}

  SINGD_HOST_DEVICE int64_t size() const { return dim; }
  SINGD_HOST_DEVICE Position position(int64_t slot) const { return {0, slot}; }
  SINGD_HOST_DEVICE int64_t slot(int64_t i, int64_t j) const { return j < i ? -1 : j - i; }
  SINGD_HOST_DEVICE int weight(int64_t i, int64_t j) const { return i == j ? 1 : 2; }
  SINGD_HOST_DEVICE int64_t column_length(int64_t j) const { return j + 1; }
  SINGD_HOST_DEVICE int64_t column_row(int64_t, int64_t n) const { return n; }
  SINGD_HOST_DEVICE int64_t row_length(int64_t i) const { return dim - i; }
  SINGD_HOST_DEVICE int64_t row_column(int64_t i, int64_t n) const { return i + n; }
};

// Host only: f(pattern) with the layout's pattern.
template <class Function>
decltype(auto) visit_pattern(const Layout& layout, Function&& f) {
  switch (layout.family) {
    case Family::kDiagonal:
    case Family::kBlockDiagonal:
      return f(BlockPattern(layout));
    case Family::kBordered:
      return f(BorderedPattern(layout));
    case Family::kToeplitz:
      return f(ToeplitzPattern(layout));
    default:
      return f(DensePattern(layout));
  }
}

}  // namespace singd
