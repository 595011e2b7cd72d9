// The rows of X or g of one layer as kernels see them: any strides, with a virtual column of ones.
#pragma once

#include <cstdint>

#include "../structures/layout.h"
#include "dtype.h"

namespace singd {

// How the threads of a block are laid over the matrix.
enum class RowAccess {
  kVectors,  // neighbouring threads at neighbouring columns, 16 bytes each: rows are aligned, and
             // their length is a multiple of 16 bytes
  kColumns,  // neighbouring threads at neighbouring columns, one element each
  kRows,     // neighbouring threads at neighbouring rows: columns are strided, rows are not
};

// Row first_row + outer * inner_count + inner lies at outer * outer_stride + inner * inner_stride
// (elements).
struct Rows {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  RowAccess access = RowAccess::kColumns;
  int64_t count = 0;      // rows before row `count` exist; below 2^31
  int64_t first_row = 0;  // the number of the row at `data`
  int64_t features = 0;   // columns in memory
  double ones = 0;        // the value of the virtual column beside them; 0 if there is none
  int64_t inner_count = 1, outer_stride = 0, inner_stride = 0, column_stride = 1;

  int64_t dim() const { return features + (ones != 0 ? 1 : 0); }
  // Row numbers fit 32 bits, which makes the division cheap.
  SINGD_HOST_DEVICE int64_t offset(int64_t row) const {
    row -= first_row;
    if (inner_count == 1) return row * outer_stride;
    const uint32_t outer = static_cast<uint32_t>(row) / static_cast<uint32_t>(inner_count);
    return outer * outer_stride + (row - outer * inner_count) * inner_stride;
  }
};

}  // namespace singd
