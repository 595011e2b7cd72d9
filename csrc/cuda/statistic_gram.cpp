// Statistics that are entries of a Gram matrix: diagonal, block-diagonal and bordered structures.
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <initializer_list>

#include "gram.h"
#include "row_kernels.h"
#include "runtime.h"
#include "statistic.h"

namespace singd::cuda {
namespace {

// Bytes of X that are read twice in a row, the second time from L2.
constexpr int64_t kChunkBytes = int64_t{16} << 20;
// Below so many blocks, panels are halved: three for every two multiprocessors of an H100.
constexpr int64_t kFewBlocks = 198;
// Rows that are materialised at a time where a border or a block is too wide for the kernels.
constexpr int64_t kLoadedBytes = int64_t{64} << 20;

// Adds Gram entries of the rows first_row ... x.count - 1 to the statistic; the grams together give
// every entry. They share their splits and partial sums, for which the first one decides.
template <class Gram>
void add_grams(std::initializer_list<Gram> grams, int64_t first_row, const at::Tensor& statistic,
               Stream stream) {
  const int64_t size = statistic.numel();
  const auto split = [&](const Gram& gram) {
    return split_rows(gram.x, gram.x.count - first_row, panels(gram),
                      size * statistic.element_size());
  };
  Gram first = *grams.begin();
  RowSplits splits = split(first);
  if (splits.count * panels(first) < kFewBlocks) {
    first.narrow = true;
    splits = fits(first) ? split(first) : splits;
  }
  const bool narrow = first.narrow && fits(first);
  const auto accumulate_all = [&](void* out, int64_t stride) {
    for (Gram gram : grams) {
      gram.narrow = narrow;
      accumulate(gram, GramSums{first_row, splits.count, splits.rows, out, stride}, stream);
    }
  };
  if (splits.count == 1) return accumulate_all(statistic.mutable_data_ptr(), 0);
  const PartialSums partial = partial_sums(splits.count, size, statistic.options());
  accumulate_all(partial.data, partial.stride);
  add_partials(partial.data, splits.count, partial.stride, size, statistic.mutable_data_ptr(),
               dtype_of(statistic), stream);
}

// squares[j] += sum over rows of x[:, j]^2.
void add_column_squares(const Rows& x, const at::Tensor& squares, Stream stream) {
  if (x.features == 0) return;
  constexpr int64_t kPanelBytes = 256;
  const int64_t panels = (x.features * size_of(x.dtype) + kPanelBytes - 1) / kPanelBytes;
  const RowSplits splits = split_rows(x, x.count, panels, x.features * squares.element_size());
  const PartialSums partial = partial_sums(splits.count, x.features, squares.options());
  SegmentSums sums;
  sums.what = ColumnSum::kSquares;
  sums.segments = splits.count;
  sums.segment_rows = splits.rows;
  sums.scale = 1;
  sums.out = partial.data;
  sums.out_dtype = dtype_of(squares);
  sums.out_stride = partial.stride;
  column_sums(x, sums, stream);
  add_partials(sums.out, splits.count, partial.stride, x.features, squares.mutable_data_ptr(),
               sums.out_dtype, stream);
}

// f(chunk) with the rows in the compute type, [m, dim], a chunk at a time.
template <class Function>
void for_each_loaded_chunk(const RowMatrix& x, Function f) {
  const int64_t width = padded_width(x.rows.dim());
  const int64_t bytes = width * (x.rows.dtype == Dtype::kFloat64 ? 8 : 4);
  const int64_t step = std::max<int64_t>(64, kLoadedBytes / bytes);
  for (int64_t begin = 0; begin < x.rows.count; begin += step) {
    const int64_t end = std::min(begin + step, x.rows.count);
    f(loaded_rows(x, begin, end, width).narrow(1, 0, x.rows.dim()));
  }
}

// Blocks wider than the kernel's panels: a batched product.
void accumulate_wide_blocks(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x) {
  const int64_t k = layout.block, q = layout.dim / k, r = layout.dim % k;
  at::Tensor blocks = statistic.narrow(0, 0, q * k * k).view({q, k, k});
  at::Tensor rest = statistic.narrow(0, q * k * k, r * r).view({r, r});
  for_each_loaded_chunk(x, [&](const at::Tensor& rows) {
    const at::Tensor columns = rows.narrow(1, 0, q * k).unflatten(1, {q, k}).permute({1, 2, 0});
    blocks.add_(at::bmm(columns, columns.transpose(1, 2)));
    const at::Tensor last = rows.narrow(1, q * k, r);
    if (r > 0) rest.addmm_(last.t(), last);
  });
}

// Borders wider than the kernel's: border rows by a product, from Y = X K if K is column-bordered.
void accumulate_wide_border(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x,
                            const at::Tensor* factor) {
  const int64_t d = layout.dim, b = layout.head + layout.tail, interior = d - b;
  at::Tensor border = statistic.narrow(0, 0, b * d).view({b, d});
  const at::Tensor squares = statistic.narrow(0, b * d, interior);
  // The border indices are the first `head` and the last `tail`: rows from, columns to.
  const auto for_each_span = [&](auto f) {
    if (layout.head > 0) f(0, 0, layout.head);
    if (layout.tail > 0) f(layout.head, d - layout.tail, layout.tail);
  };
  for_each_loaded_chunk(x, [&](const at::Tensor& y) {
    if (factor != nullptr) {
      const at::Tensor s = y.mm(factor->narrow(0, 0, b * d).view({b, d}).t());
      y.narrow(1, layout.head, interior).mul_(factor->narrow(0, b * d, interior));
      for_each_span([&](int64_t row, int64_t column, int64_t count) {
        y.narrow(1, column, count).copy_(s.narrow(1, row, count));
      });
    }
    for_each_span([&](int64_t row, int64_t column, int64_t count) {
      border.narrow(0, row, count).addmm_(y.narrow(1, column, count).t(), y);
    });
    const at::Tensor inside = y.narrow(1, layout.head, interior).unsqueeze(0);
    const RowMatrix columns = row_matrix(inside, false, Shared::kExpand, y.scalar_type());
    add_column_squares(columns.rows, squares, x.stream);
  });
}

// Column-bordered K: S = X K[:, B], then S^T X D and S^T S, for rows that stay in L2 in between.
void accumulate_column_bordered(BorderedGram gram, const at::Tensor& statistic, const RowMatrix& x,
                                const at::Tensor& factor) {
  const int64_t b = gram.head + gram.tail, m = x.rows.count;
  const int64_t row_bytes = std::max<int64_t>(1, x.rows.features * size_of(x.rows.dtype));
  const int64_t step = std::min(m, std::max<int64_t>(64, kChunkBytes / row_bytes / 64 * 64));
  const at::Tensor s = at::empty({1, step, border_width(b)}, factor.options());
  gram.border = row_matrix(s, false, Shared::kExpand, s.scalar_type()).rows;
  gram.scale =
      static_cast<const char*>(factor.const_data_ptr()) + b * gram.dim * factor.element_size();
  for (int64_t begin = 0; begin < m; begin += step) {
    gram.x.count = gram.border.count = std::min(begin + step, m);
    gram.border.first_row = begin;
    border_product(gram.x, factor.const_data_ptr(), b, begin, s.mutable_data_ptr(), x.stream);
    BorderedGram core = gram;
    core.x = gram.border;
    core.packed = true;
    add_grams({gram, core}, begin, statistic, x.stream);
  }
}

}  // namespace

void accumulate_diagonal(const at::Tensor& statistic, const RowMatrix& x) {
  add_column_squares(x.rows, statistic, x.stream);
  if (x.rows.ones != 0) {
    const double squares = static_cast<double>(x.rows.count) * x.rows.ones * x.rows.ones;
    statistic.narrow(0, x.rows.features, 1).add_(squares);
  }
}

void accumulate_blocks(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x) {
  const BlockGram gram{x.rows, layout.block};
  if (!fits(gram)) return accumulate_wide_blocks(layout, statistic, x);
  add_grams({gram}, 0, statistic, x.stream);
}

void accumulate_bordered(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x,
                         const at::Tensor* factor) {
  const at::Tensor* applied = layout.transposed ? factor : nullptr;
  BorderedGram gram;
  gram.x = x.rows;
  gram.dim = layout.dim;
  gram.head = layout.head;
  gram.tail = layout.tail;
  if (!fits(gram)) return accumulate_wide_border(layout, statistic, x, applied);
  if (applied != nullptr) return accumulate_column_bordered(gram, statistic, x, *applied);
  add_grams({gram}, 0, statistic, x.stream);
}

}  // namespace singd::cuda
