// The statistic of a diagonal, block-diagonal or bordered factor, rows and columns split among
// threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>

#include "../structures/layout.h"
#include "../structures/spec.h"
#include "kernels.h"
#include "thread_scratch.h"

namespace singd::cpu {

template <class T>
class LocalStatistic {
 public:
  // `factor` is the storage of K, or null for K = I; `overwrite`: the statistic holds nothing yet.
  LocalStatistic(const RowsView& rows, const Layout& layout, const T* factor, T* statistic,
                 bool overwrite = false)
      : rows_(rows),
        layout_(layout),
        factor_(factor),
        statistic_(statistic),
        overwrite_(overwrite) {}

  void add() const {
    if (rows_.count == 0) return start(0, storage_size(layout_));
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

  // Numbers [begin, end) of the statistic are about to be added to.
  void start(int64_t begin, int64_t end) const {
    if (overwrite_) std::fill(statistic_ + begin, statistic_ + end, T(0));
  }

  int64_t border() const { return layout_.head + layout_.tail; }

  // What was summed up: sums of `splits` shares of the rows, `stride` apart.
  struct Parts {
    T* sums;
    int64_t splits, stride;
  };

  // sum(part, sums) for rectangles of X, in threads: adds to sums of `size` numbers, which those of
  // the same rows share.
  //
  // Rows are split first: a thread that has whole rows reads memory as it lies there, and mostly
  // what it wrote itself when these rows were computed. Each split has sums of its own, and there
  // are as many splits as keep these a small part of X. Columns are split among what threads are
  // left, in whole units.
  template <class Function>
  Parts sum_in_parts(int64_t unit, int64_t size, int64_t work, Function sum) const {
    const int64_t d = layout_.dim, m = rows_.count, units = (d + unit - 1) / unit;
    const int64_t useful = std::max<int64_t>(1, m * d * work / kLeastWork);
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), useful);
    const int64_t splits = std::clamp<int64_t>(m * d / (kLeastShare * size), 1, threads);
    const int64_t strips = std::clamp<int64_t>(threads / splits, 1, units);
    const int64_t stride = padded(size);
    T* all = thread_scratch<T, Sums>(splits * stride);
    if (strips > 1) std::fill_n(all, splits * stride, T(0));
    at::parallel_for(0, splits * strips, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t split = i / strips, strip = i % strips;
        const Panel part{m * split / splits, m * (split + 1) / splits,
                         units * strip / strips * unit,
                         std::min(d, units * (strip + 1) / strips * unit)};
        T* own = all + split * stride;
        if (strips == 1) std::fill_n(own, stride, T(0));
        sum(part, own);
      }
    });
    return {all, splits, stride};
  }

  // finish(first, last, sums) for shares of `count` pieces of `size` sums, in threads: the sums of
  // all splits, in an order that the number of threads decides.
  template <class Function>
  void add_up(const Parts& parts, int64_t count, int64_t size, Function finish) const {
    const int64_t least = std::max<int64_t>(1, kLeastSums / size);
    at::parallel_for(0, count, least, [&](int64_t first, int64_t last) {
      for (int64_t split = 1; split < parts.splits; ++split) {
        kernels_.add(parts.sums + split * parts.stride + first * size, (last - first) * size,
                     parts.sums + first * size);
      }
      finish(first, last, parts.sums);
    });
  }

  // Scratch for rows of a chunk, with so many columns more.
  static T* chunk_scratch(int64_t more) {
    return thread_scratch<T>(kChunkDepth * (kChunkColumns + more + 2 * kPadding));
  }

  void add_diagonal() const {
    const int64_t d = layout_.dim;
    const Parts parts = sum_in_parts(kPadding, padded(d), 1, [&](const Panel& part, T* to) {
      kernels_.diagonal(rows_, part, to, chunk_scratch(std::max<int64_t>(0, d / kChunkDepth)));
    });
    add_up(parts, d, 1, [&](int64_t first, int64_t last, const T* sums) {
      start(first, last);
      kernels_.add(sums + first, last - first, statistic_ + first);
    });
  }

  void add_blocks() const {
    const int64_t d = layout_.dim, k = layout_.block, blocks = (d + k - 1) / k;
    const int64_t area = k * padded(k);
    const Parts parts = sum_in_parts(k, blocks * area, k, [&](const Panel& part, T* to) {
      gram_.blocks(rows_, layout_, part, to, chunk_scratch(k));
    });
    add_up(parts, blocks, area, [&](int64_t first, int64_t last, const T* sums) {
      start(first * k * k, last == blocks ? storage_size(layout_) : last * k * k);
      kernels_.finish_blocks(layout_, sums, first * k, std::min(d, last * k), statistic_);
    });
  }

  // E^T X and behind its rows the column squares; where E [rows, padded(border)] is null it is the
  // border columns of X.
  Parts border_sums(const T* e) const {
    const GramKernels<T>& gram = e == nullptr ? gram_ : kernels_.gram;
    const int64_t size = (border() + 1) * padded(layout_.dim);
    return sum_in_parts(kPadding, size, border() + 1, [&](const Panel& part, T* to) {
      // A border of one row takes two rows of sums.
      const int64_t more = std::max(padded(border()), 2 * layout_.dim / kChunkDepth);
      gram.border(rows_, layout_, e, part, to, chunk_scratch(more));
    });
  }

  void add_row_border() const {
    add_up(border_sums(nullptr), border() + 1, padded(layout_.dim),
           [&](int64_t first, int64_t last, const T* sums) {
             const int64_t d = layout_.dim, b = border();
             start(first * d, last > b ? storage_size(layout_) : last * d);
             kernels_.finish_row_border(layout_, sums, first, last, statistic_);
           });
  }

  // S = X K[:, B] first, then S^T X; K is applied to that small matrix from the right at the end.
  void add_column_border() const {
    const int64_t d = layout_.dim, b = border(), thin = padded(b);
    T* v = thread_scratch<T, Thin>(d * thin + rows_.count * thin + b * thin);
    T *s = v + d * thin, *scratch = s + rows_.count * thin;
    kernels_.transpose(factor_, b, d, d, v, thin);
    const int64_t least = std::max<int64_t>(kProductRows, kLeastWork / (d * b));
    at::parallel_for(0, rows_.count, least, [&](int64_t begin, int64_t end) {
      kernels_.border_rows(rows_, layout_, factor_, v, begin, end - begin, s,
                           thread_scratch<T>(2 * kProductRows * padded(d)));
    });
    const Parts parts = border_sums(s);
    add_up(parts, b + 1, padded(d), [](int64_t, int64_t, const T*) {});
    start(0, storage_size(layout_));
    kernels_.finish_column_border(layout_, factor_, v, parts.sums, statistic_, scratch);
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

  // Multiplications, and sums added up, below which a further thread costs more than it saves, and
  // how many times as large as the sums of a split its rows are at least.
  static constexpr int64_t kLeastWork = 1 << 15, kLeastSums = 1 << 13, kLeastShare = 4;

  const RowsView& rows_;
  const Layout& layout_;
  const T* factor_;
  T* statistic_;
  bool overwrite_;
  const StatisticKernels<T>& kernels_ = kernels().statistic<T>();
  const GramKernels<T>& gram_ = gram_kernels(rows_, std::max(layout_.block, border()));
};

}  // namespace singd::cpu
