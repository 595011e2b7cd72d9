// The statistic of a diagonal, block-diagonal or bordered factor, columns split among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>
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

  // f(begin, end) for the columns of each thread, in whole units.
  template <class Function>
  void for_each_range(int64_t unit, int64_t work, Function f) const {
    const int64_t units = (layout_.dim + unit - 1) / unit;
    const int64_t least =
        std::max<int64_t>(1, kLeastWork / std::max<int64_t>(1, rows_.count * unit * work));
    at::parallel_for(0, units, least, [&](int64_t first, int64_t last) {
      f(first * unit, std::min(last * unit, layout_.dim));
    });
  }

  // And for panels of at most so many of them.
  template <class Function>
  void for_each_panel(int64_t unit, int64_t work, int64_t columns, Function f) const {
    const int64_t step = std::max<int64_t>(1, columns / unit) * unit;
    for_each_range(unit, work, [&](int64_t first, int64_t last) {
      for (int64_t begin = first; begin < last; begin += step) {
        f(begin, std::min(begin + step, last));
      }
    });
  }

  void add_diagonal() const {
    for_each_panel(kPadding, 1, kWideColumns, [&](int64_t begin, int64_t end) {
      T* scratch = thread_scratch<T>((kChunkDepth + 1) * padded(end - begin));
      kernels_.diagonal(rows_, begin, end, statistic_, scratch);
    });
  }

  void add_blocks() const {
    const int64_t k = layout_.block, area = k * padded(k);
    for_each_panel(k, k, kPanelColumns, [&](int64_t begin, int64_t end) {
      const int64_t blocks = (end - begin + k - 1) / k;
      const int64_t chunk = kChunkDepth * (padded(end - begin) + kPadding);
      T* scratch = thread_scratch<T>(chunk + (blocks + 1) * area);
      gram_.blocks(rows_, layout_, begin, end, statistic_, scratch);
    });
  }

  // Of rows that E^T X takes at a time: E fits the second cache.
  static constexpr int64_t kBorderRows = 512;

  // E^T X [border, dim] and column squares [padded(dim)]; where E [rows, padded(border)] is null it
  // is the border columns of X, of which each thread brings its own copy.
  void add_border(const T* e, T* products, T* squares) const {
    const int64_t thin = padded(border());
    const GramKernels<T>& gram = e == nullptr ? gram_ : kernels_.gram;
    for_each_range(kPadding, border(), [&](int64_t first_column, int64_t last_column) {
      const int64_t panel = kChunkDepth + thin;
      T* own = thread_scratch<T>(kBorderRows * thin + panel * kPanelColumns);
      T* scratch = own + kBorderRows * thin;
      for (int64_t row = 0; row < rows_.count; row += kBorderRows) {
        const int64_t count = std::min(kBorderRows, rows_.count - row);
        if (e == nullptr) gram.border_columns(rows_, layout_, row, count, own);
        const T* left = e == nullptr ? own : e + row * thin;
        for (int64_t begin = first_column; begin < last_column; begin += kPanelColumns) {
          gram.border(rows_, layout_, left, row, count, begin,
                      std::min(begin + kPanelColumns, last_column), products, squares, scratch);
        }
      }
    });
  }

  void add_row_border() const {
    std::vector<T> squares(static_cast<size_t>(padded(layout_.dim)), T(0));
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
    std::vector<T> sums(static_cast<size_t>(b * d + padded(d) + b * thin), T(0));
    kernels_.transpose(factor_, b, d, d, v.data(), thin);
    const int64_t least = std::max<int64_t>(kProductRows, kLeastWork / (d * b));
    at::parallel_for(0, rows_.count, least, [&](int64_t begin, int64_t end) {
      kernels_.border_rows(rows_, layout_, v.data(), begin, end - begin, s.data(),
                           thread_scratch<T>(kProductRows * padded(d)));
    });
    T *products = sums.data(), *squares = products + b * d, *scratch = squares + padded(d);
    add_border(s.data(), products, squares);
    kernels_.finish_column_border(layout_, factor_, v.data(), products, squares, statistic_,
                                  scratch);
  }

  static const GramKernels<T>& gram_kernels(const RowsView& rows) {
    if constexpr (std::is_same_v<T, float>) {
      const bool as_they_are = rows.feature_stride == 1 && !rows.reduce;
      const GramKernels<float>* own =
          as_they_are && rows.array.type == Scalar::kBFloat16 ? bfloat16_gram() : nullptr;
      if (own != nullptr) return *own;
    }
    return kernels().statistic<T>().gram;
  }

  // Multiplications below which a further thread costs more than it saves.
  static constexpr int64_t kLeastWork = 1 << 17;

  const RowsView& rows_;
  const Layout& layout_;
  const T* factor_;
  T* statistic_;
  const StatisticKernels<T>& kernels_ = kernels().statistic<T>();
  const GramKernels<T>& gram_ = gram_kernels(rows_);
};

}  // namespace singd::cpu
