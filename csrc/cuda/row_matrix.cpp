#include <ATen/ops/empty.h>

#include <algorithm>

#include "row_kernels.h"
#include "runtime.h"
#include "statistic.h"

namespace singd::cuda {
namespace {

constexpr int64_t kTargetBlocks = 264;  // two for each multiprocessor of an H100
constexpr int64_t kPartialShare = 8;    // partial sums take at most this fraction of the rows

// Whether every row begins at a multiple of 16 bytes and has a length that is one.
bool is_aligned(const Rows& rows, int64_t inner_rows) {
  const int64_t vector = 16 / size_of(rows.dtype);
  const bool inner = inner_rows <= 1 || rows.inner_stride % vector == 0;
  return rows.features % vector == 0 && rows.outer_stride % vector == 0 && inner &&
         reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

// Every (batch, shared) position is a row.
Rows describe(const at::Tensor& x) {
  Rows rows;
  rows.data = x.const_data_ptr();
  rows.dtype = dtype_of(x);
  rows.count = x.size(0) * x.size(1);
  rows.features = x.size(2);
  TORCH_CHECK_VALUE(rows.count <= INT32_MAX, "singd_ext: ", rows.count,
                    " rows in one call; at most 2^31 - 1 are supported");
  if (x.size(1) == 1) {
    rows.outer_stride = x.stride(0);
  } else if (x.size(0) == 1 || x.stride(0) == x.size(1) * x.stride(1)) {
    rows.outer_stride = x.stride(1);
  } else {
    rows.inner_count = x.size(1);
    rows.outer_stride = x.stride(0);
    rows.inner_stride = x.stride(1);
  }
  rows.column_stride = rows.features > 1 ? x.stride(2) : 1;
  const int64_t row_stride = rows.inner_count > 1 ? rows.inner_stride : rows.outer_stride;
  if (rows.column_stride != 1) {
    rows.access = row_stride < rows.column_stride ? RowAccess::kRows : RowAccess::kColumns;
  } else {
    rows.access = is_aligned(rows, rows.inner_count) ? RowAccess::kVectors : RowAccess::kColumns;
  }
  return rows;
}

// One row a batch entry, in the compute type: the mean or the sum over `shared`.
at::Tensor reduced(const at::Tensor& x, Shared shared, Stream stream) {
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t batch = x.size(0), width = padded_width(x.size(2));
  const at::Tensor out = at::empty({batch, 1, width}, x.options().dtype(dtype));
  SegmentSums sums;
  sums.what = ColumnSum::kValues;
  sums.segments = batch;
  sums.segment_rows = x.size(1);
  sums.scale = shared == Shared::kMean ? 1.0 / static_cast<double>(x.size(1)) : 1.0;
  sums.out = out.mutable_data_ptr();
  sums.out_dtype = dtype_of(dtype);
  sums.out_stride = width;
  column_sums(describe(x), sums, stream);
  return out.narrow(2, 0, x.size(2));
}

}  // namespace

int64_t padded_width(int64_t columns) { return (columns + 7) / 8 * 8; }

RowMatrix row_matrix(const at::Tensor& rows, bool ones_column, Shared shared,
                     at::ScalarType dtype) {
  RowMatrix x;
  x.stream = current_stream(rows);
  const bool converts = (rows.scalar_type() == at::kDouble) != (dtype == at::kDouble);
  x.tensor = converts ? rows.to(dtype) : rows;
  if (shared != Shared::kExpand && rows.size(1) > 1) x.tensor = reduced(x.tensor, shared, x.stream);
  x.rows = describe(x.tensor);
  if (ones_column) {
    x.rows.ones = shared == Shared::kSum ? static_cast<double>(rows.size(1)) : 1.0;
  }
  return x;
}

at::Tensor loaded_rows(const RowMatrix& x, int64_t begin, int64_t end, int64_t width) {
  const auto dtype = x.rows.dtype == Dtype::kFloat64 ? at::kDouble : at::kFloat;
  const at::Tensor out = at::empty({end - begin, width}, x.tensor.options().dtype(dtype));
  load_rows(x.rows, begin, end - begin, width, out.mutable_data_ptr(), x.stream);
  return out;
}

RowSplits split_rows(const Rows& x, int64_t row_count, int64_t panels, int64_t sum_bytes) {
  constexpr int64_t kLeastRows = 64;
  const int64_t bytes = row_count * x.features * size_of(x.dtype);
  const int64_t allowed = std::max<int64_t>(1, bytes / kPartialShare / sum_bytes);
  const int64_t wanted = std::max<int64_t>(1, kTargetBlocks / panels);
  const int64_t count = std::min(allowed, wanted);
  int64_t rows = (row_count + count - 1) / count;
  rows = (rows + kLeastRows - 1) / kLeastRows * kLeastRows;
  return {(row_count + rows - 1) / rows, rows};
}

PartialSums partial_sums(int64_t splits, int64_t size, const at::TensorOptions& options) {
  const int64_t line = kLineBytes / static_cast<int64_t>(options.dtype().itemsize());
  PartialSums sums;
  sums.stride = (size + line - 1) / line * line;
  sums.memory = at::empty({splits * sums.stride + line}, options);
  const auto address = reinterpret_cast<uintptr_t>(sums.memory.mutable_data_ptr());
  sums.data = reinterpret_cast<void*>((address + kLineBytes - 1) / kLineBytes * kLineBytes);
  return sums;
}

}  // namespace singd::cuda
