// Passes over rows (rows.h) that several structures share.
#pragma once

#include <cstdint>

#include "../structures/layout.h"
#include "arguments.h"
#include "rows.h"

namespace singd::cuda {

enum class ColumnSum { kValues, kSquares };

// The rows in consecutive segments of segment_rows (the last may be shorter): per segment s
//   out[s * out_stride + j] = scale * sum over its rows r of x[r, j] or x[r, j]^2,
// j < rows.features, in float (rows up to float32, out float32), or in double (out float64).
struct SegmentSums {
  ColumnSum what;
  int64_t segments, segment_rows;
  double scale;
  void* out;
  Dtype out_dtype;
  int64_t out_stride;
};
void column_sums(const Rows& rows, const SegmentSums& sums, Stream stream);

// to[i] += sum over s < count of partial[s * stride + i], in this order, for i < size; both have
// the given dtype. The partial sums are gone afterwards: their lines of L2 are discarded, which
// nothing else may share. So `partial` and the stride are multiples of a line.
constexpr int64_t kLineBytes = 128;
void add_partials(void* partial, int64_t count, int64_t stride, int64_t size, void* to, Dtype dtype,
                  Stream stream);

// out[r * width + j] = rows [first_row + r, j] for r < count; zero for rows.dim() <= j < width.
// out is float64 for float64 rows, float32 otherwise; width is a multiple of 8.
void load_rows(const Rows& rows, int64_t first_row, int64_t count, int64_t width, void* out,
               Stream stream);

// h <- Pi applied to the entries of a symmetric matrix, in place: weights, zeros off the pattern,
// and means over diagonals for Toeplitz, where h holds the sums.
void weigh(const Layout& layout, void* h, Dtype dtype, Stream stream);

}  // namespace singd::cuda
