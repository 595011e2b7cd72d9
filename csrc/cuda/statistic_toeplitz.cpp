// Triangular Toeplitz structures: the autocorrelation of the rows of Y = X K, summed over rows.
// A product with K is a causal convolution along a row (anticausal for lower Toeplitz K), by FFT of
// a length that does not wrap around. Rows go through in chunks that stay in L2. Power spectra are
// summed in float64: rounding there would spread over all lags, also where few terms make one.
#include <ATen/ops/conj_physical.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/fft_irfft.h>
#include <ATen/ops/fft_rfft.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../structures/toeplitz.h"
#include "row_kernels.h"
#include "runtime.h"
#include "statistic.h"

namespace singd::cuda {
namespace {

constexpr int64_t kChunkBytes = int64_t{16} << 20;

// power[f] += sum over rows of re^2 (even f) and im^2 (odd f).
void add_power(const at::Tensor& spectrum, const at::Tensor& power, Stream stream) {
  const at::Tensor parts = at::view_as_real(spectrum.contiguous()).flatten(1).unsqueeze(0);
  const RowMatrix x = row_matrix(parts, false, Shared::kExpand, parts.scalar_type());
  constexpr int64_t kPanelColumns = 64;
  const int64_t panels = (x.rows.features + kPanelColumns - 1) / kPanelColumns;
  const RowSplits splits = split_rows(x.rows, x.rows.count, panels, x.rows.features * 8);
  const PartialSums partial = partial_sums(splits.count, x.rows.features, power.options());
  SegmentSums sums;
  sums.what = ColumnSum::kSquares;
  sums.segments = splits.count;
  sums.segment_rows = splits.rows;
  sums.scale = 1;
  sums.out = partial.data;
  sums.out_dtype = Dtype::kFloat64;
  sums.out_stride = partial.stride;
  column_sums(x.rows, sums, stream);
  add_partials(sums.out, splits.count, partial.stride, x.rows.features, power.mutable_data_ptr(),
               Dtype::kFloat64, stream);
}

}  // namespace

void accumulate_toeplitz(const Layout& layout, const at::Tensor& statistic, const RowMatrix& x,
                         const at::Tensor* factor) {
  const int64_t d = layout.dim, n = fft_length(d);
  at::Tensor kernel;
  if (factor != nullptr) {
    kernel = at::fft_rfft(factor->view({1, d}), n, 1);
    if (layout.transposed) kernel = at::conj_physical(kernel);
  }
  const int64_t frequencies = n / 2 + 1;
  const at::Tensor power = at::zeros({2 * frequencies}, statistic.options().dtype(at::kDouble));
  const int64_t step = std::max<int64_t>(1, kChunkBytes / (n * statistic.element_size()));
  for (int64_t begin = 0; begin < x.rows.count; begin += step) {
    const int64_t end = std::min(begin + step, x.rows.count);
    const at::Tensor rows = loaded_rows(x, begin, end, padded_width(n)).narrow(1, 0, n);
    at::Tensor spectrum = at::fft_rfft(rows, std::nullopt, 1);
    if (factor != nullptr) {
      const at::Tensor y = at::fft_irfft(spectrum.mul_(kernel), n, 1);
      y.narrow(1, d, n - d).zero_();
      spectrum = at::fft_rfft(y, std::nullopt, 1);
    }
    add_power(spectrum, power, x.stream);
  }
  const at::Tensor total = power.view({frequencies, 2}).sum(1).to(at::kComplexDouble);
  statistic.narrow(0, 0, d).add_(at::fft_irfft(total, n, 0).narrow(0, 0, d));
}

}  // namespace singd::cuda
