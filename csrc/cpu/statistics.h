// The statistic of a diagonal, block-diagonal or bordered factor, rows and columns split among
// threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>

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
    if (rows_.count == 0) return;
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
  struct Sums;  // whose memory outlives the call
  struct Thin;

  int64_t border() const { return layout_.head + layout_.tail; }

  // sum(part, sums) for rectangles of X, in threads: adds to sums of `size` numbers, which those of
  // the same rows share. Returns the sums of all, in an order that the number of threads decides.
  //
  // Rows are split first: a thread that has whole rows reads memory as it lies there, and mostly
  // what it wrote itself when these rows were computed. Each split has sums of its own, and there
  // are as many splits as keep these a small part of X. Columns are split among what threads are
  // left, in whole units.
  template <class Function>
  T* sum_in_parts(int64_t unit, int64_t size, int64_t work, Function sum) const {
    const int64_t d = layout_.dim, m = rows_.count, units = (d + unit - 1) / unit;
    const int64_t useful = std::max<int64_t>(1, m * d * work / kLeastWork);
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), useful);
    const int64_t splits = std::clamp<int64_t>(m * d / (kLeastShare * size), 1, threads);
    const int64_t strips = std::clamp<int64_t>(threads / splits, 1, units);
    const int64_t stride = padded(size);
    T* all = thread_scratch<T, Sums>(splits * stride);
    std::fill_n(all, splits * stride, T(0));
    at::parallel_for(0, splits * strips, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t split = i / strips, strip = i % strips;
        const Panel part{m * split / splits, m * (split + 1) / splits,
                         units * strip / strips * unit,
                         std::min(d, units * (strip + 1) / strips * unit)};
        sum(part, all + split * stride);
      }
    });
    for (int64_t split = 1; split < splits; ++split) kernels_.add(all + split * stride, size, all);
    return all;
  }

  // Scratch for rows of a chunk, with so many columns more.
  static T* chunk_scratch(int64_t more) {
    return thread_scratch<T>(kChunkDepth * (kChunkColumns + more + 2 * kPadding));
  }

  void add_diagonal() const {
    const T* sums = sum_in_parts(kPadding, padded(layout_.dim), 1, [&](const Panel& part, T* to) {
      kernels_.diagonal(rows_, part, to,
                        chunk_scratch(std::max<int64_t>(0, layout_.dim / kChunkDepth)));
    });
    kernels_.add(sums, layout_.dim, statistic_);
  }

  void add_blocks() const {
    const int64_t d = layout_.dim, k = layout_.block, blocks = (d + k - 1) / k;
    const T* sums = sum_in_parts(k, blocks * k * padded(k), k, [&](const Panel& part, T* to) {
      gram_.blocks(rows_, layout_, part, to, chunk_scratch(k));
    });
    kernels_.finish_blocks(layout_, sums, 0, d, statistic_);
  }

  // E^T X and column squares; where E [rows, padded(border)] is null it is the border columns of X.
  T* border_sums(const T* e) const {
    const GramKernels<T>& gram = e == nullptr ? gram_ : kernels_.gram;
    const int64_t size = (border() + 1) * padded(layout_.dim);
    return sum_in_parts(kPadding, size, border() + 1, [&](const Panel& part, T* to) {
      gram.border(rows_, layout_, e, part, to, chunk_scratch(padded(border())));
    });
  }

  void add_row_border() const {
    kernels_.finish_row_border(layout_, border_sums(nullptr), statistic_);
  }

  // S = X K[:, B] first, then S^T X; K is applied to that small matrix from the right at the end.
  void add_column_border() const {
    const int64_t d = layout_.dim, b = border(), thin = padded(b);
    T* v = thread_scratch<T, Thin>(d * thin + rows_.count * thin + b * thin);
    T *s = v + d * thin, *scratch = s + rows_.count * thin;
    kernels_.transpose(factor_, b, d, d, v, thin);
    const int64_t least = std::max<int64_t>(kProductRows, kLeastWork / (d * b));
    at::parallel_for(0, rows_.count, least, [&](int64_t begin, int64_t end) {
      kernels_.border_rows(rows_, layout_, v, begin, end - begin, s,
                           thread_scratch<T>(kProductRows * padded(d)));
    });
    kernels_.finish_column_border(layout_, factor_, v, border_sums(s), statistic_, scratch);
  }

  static const GramKernels<T>& gram_kernels(const RowsView& rows, int64_t width) {
    if constexpr (std::is_same_v<T, float>) {
      const bool as_they_are = rows.feature_stride == 1 && !rows.reduce;
      const GramKernels<float>* own =
          as_they_are && rows.array.type == Scalar::kBFloat16 ? bfloat16_gram(width) : nullptr;
      if (own != nullptr) return *own;
    }
    return kernels().statistic<T>().gram;
  }

  // Multiplications below which a further thread costs more than it saves, and how many times as
  // large as the sums of a split its rows are at least.
  static constexpr int64_t kLeastWork = 1 << 15, kLeastShare = 4;

  const RowsView& rows_;
  const Layout& layout_;
  const T* factor_;
  T* statistic_;
  const StatisticKernels<T>& kernels_ = kernels().statistic<T>();
  const GramKernels<T>& gram_ = gram_kernels(rows_, std::max(layout_.block, border()));
};

}  // namespace singd::cpu
