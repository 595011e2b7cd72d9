// The statistic of a diagonal, block-diagonal or bordered factor, columns split among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "../structures/layout.h"
#include "kernels.h"
#include "thread_scratch.h"

namespace singd::cpu {

template <class T>
class LocalStatistic {
 public:
  // `factor` is the storage of K, or null for K = I.
  LocalStatistic(const RowsView& rows, const Layout& layout, const T* factor, T* statistic)
      : rows_(rows), layout_(layout), factor_(factor), statistic_(statistic) {}

  void add() const {
    switch (layout_.family) {
      case Family::kDiagonal:
        return add_diagonal();
      case Family::kBlockDiagonal:
        return add_blocks();
      default:
        return layout_.transposed && factor_ != nullptr ? add_column_border() : add_row_border();
    }
  }

 private:
  // Columns of a panel: of a chunk of rows they fit the first cache; of one row, for squares alone.
  static constexpr int64_t kPanelColumns = 96, kWideColumns = 4096;

  int64_t border() const { return layout_.head + layout_.tail; }

  // f(begin, end) for panels of at most so many columns, in whole units, in threads.
  template <class Function>
  void for_each_panel(int64_t unit, int64_t work, int64_t columns, Function f) const {
    const int64_t units = (layout_.dim + unit - 1) / unit;
    const int64_t least =
        std::max<int64_t>(1, kLeastWork / std::max<int64_t>(1, rows_.count * unit * work));
    at::parallel_for(0, units, least, [&](int64_t first, int64_t last) {
      const int64_t step = std::max<int64_t>(1, columns / unit);
      for (int64_t i = first; i < last; i += step) {
        f(i * unit, std::min(std::min(i + step, last) * unit, layout_.dim));
      }
    });
  }

  void add_diagonal() const {
    for_each_panel(kPadding, 1, kWideColumns, [&](int64_t begin, int64_t end) {
      T* scratch = thread_scratch<T>((kChunkRows + 1) * padded(end - begin));
      kernels_.diagonal(rows_, begin, end, statistic_, scratch);
    });
  }

  void add_blocks() const {
    const int64_t k = padded(layout_.block);
    for_each_panel(layout_.block, layout_.block, kPanelColumns, [&](int64_t begin, int64_t end) {
      T* scratch = thread_scratch<T>(kChunkRows * (padded(end - begin) + kPadding) + k * k);
      kernels_.blocks(rows_, layout_, begin, end, statistic_, scratch);
    });
  }

  // products [border, dim] and squares [dim] of all columns.
  void add_border(const T* e, T* products, T* squares) const {
    const int64_t thin = padded(border());
    for_each_panel(kPadding, border(), kPanelColumns, [&](int64_t begin, int64_t end) {
      const int64_t wide = padded(end - begin);
      T* scratch = thread_scratch<T>((kChunkRows + 1 + thin) * wide + 2 * kChunkRows * thin);
      kernels_.border(rows_, layout_, e, begin, end, products, squares, scratch);
    });
  }

  void add_row_border() const {
    std::vector<T> squares(static_cast<size_t>(layout_.dim), T(0));
    add_border(nullptr, statistic_, squares.data());
    T* diagonal = statistic_ + border() * layout_.dim;
    for (int64_t j = layout_.head; j < layout_.dim - layout_.tail; ++j) {
      diagonal[j - layout_.head] += squares[static_cast<size_t>(j)];
    }
  }

  // S = X K[:, B] first, then S^T X; K is applied to that small matrix from the right at the end.
  void add_column_border() const {
    const int64_t d = layout_.dim, b = border(), thin = padded(b);
    std::vector<T> v(static_cast<size_t>(d * thin)), s(static_cast<size_t>(rows_.count * thin));
    std::vector<T> sums(static_cast<size_t>((b + 1) * d + b * thin), T(0));
    kernels_.transpose(factor_, b, d, d, v.data(), thin);
    const int64_t least = std::max<int64_t>(kProductRows, kLeastWork / (d * b));
    at::parallel_for(0, rows_.count, least, [&](int64_t begin, int64_t end) {
      kernels_.border_rows(rows_, layout_, v.data(), begin, end - begin, s.data(),
                           thread_scratch<T>(kProductRows * padded(d)));
    });
    T *products = sums.data(), *squares = products + b * d, *scratch = squares + d;
    add_border(s.data(), products, squares);
    kernels_.finish_column_border(layout_, factor_, v.data(), products, squares, statistic_,
                                  scratch);
  }

  // Multiplications below which a further thread costs more than it saves.
  static constexpr int64_t kLeastWork = 1 << 17;

  const RowsView& rows_;
  const Layout& layout_;
  const T* factor_;
  T* statistic_;
  const StatisticKernels<T>& kernels_ = kernels().statistic<T>();
};

}  // namespace singd::cpu
