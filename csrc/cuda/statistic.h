// The statistic of a Kronecker factor (docs/structures.md), launcher side. One function a family,
// called with at least one row; `factor` is K in the statistic's dtype, or null for K = I.
#pragma once

#include <ATen/core/Tensor.h>

#include "../op_checks.h"
#include "../structures/layout.h"
#include "arguments.h"
#include "rows.h"

namespace singd::cuda {

// Rows of an operator: `rows` describes the memory of `tensor`, [batch, shared, features].
struct RowMatrix {
  at::Tensor tensor;
  Rows rows;
  Stream stream = nullptr;
};

// The rows with KFAC-reduce applied. `dtype` is the statistic's; the rows are float64 if and only
// if it is.
RowMatrix row_matrix(const at::Tensor& rows, bool ones_column, Shared shared, at::ScalarType dtype);

// The rows `begin` to `end` in the compute type with the column of ones, [end - begin, width] and
// zero beyond rows.dim(); width is a multiple of 8.
at::Tensor loaded_rows(const RowMatrix& x, int64_t begin, int64_t end, int64_t width);

// A multiple of 8 that is at least `columns`.
int64_t padded_width(int64_t columns);

// How rows are split over the blocks of a grid, so that it fills a GPU but the partial sums, of
// `sum_bytes` a split, stay below an eighth of the bytes of the rows: they come from L2.
struct RowSplits {
  int64_t count, rows;
};
RowSplits split_rows(const Rows& x, int64_t row_count, int64_t panels, int64_t sum_bytes);

// Memory for `size` sums of every split, from data + split * stride on, for add_partials.
struct PartialSums {
  at::Tensor memory;
  void* data;
  int64_t stride;
};
PartialSums partial_sums(int64_t splits, int64_t size, const at::TensorOptions& options);

// statistic += what the family keeps of the rows.
void accumulate_statistic(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x,
                          const at::Tensor* factor);

void accumulate_diagonal(const at::Tensor& statistic, const RowMatrix& x);
void accumulate_blocks(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x);
void accumulate_bordered(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x,
                         const at::Tensor* factor);
void accumulate_toeplitz(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x,
                         const at::Tensor* factor);
void accumulate_dense(const at::Tensor& statistic, const RowMatrix& x, const at::Tensor* factor);

}  // namespace singd::cuda
