// The statistic of bfloat16 rows for dense, triangular and small Toeplitz factors, on processors
// that multiply such numbers fast. Y = X K is ATen's and is rounded to bfloat16, as torch does it;
// products of Y are exact, and their sums float32. They make H = Y^T Y, or its diagonals' sums.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "kernels.h"
#include "math.h"
#include "rows.h"
#include "shares.h"
#include "thread_scratch.h"
#include "toeplitz_product.h"

namespace singd::cpu {

class Bfloat16Statistic {
 public:
  Bfloat16Statistic(const Layout& layout, float* statistic)
      : layout_(layout), statistic_(statistic) {}

  // Whether a statistic is to be made here.
  static bool takes(const at::Tensor& rows, const at::Tensor& factor, const Layout& layout,
                    Shared shared) {
    const int64_t d = layout.dim;
    const bool fits = layout.family == Family::kDense ||
                      (layout.family == Family::kToeplitz && d <= kWidestToeplitz);
    const bool numbers =
        rows.scalar_type() == at::kBFloat16 && factor.scalar_type() == at::kBFloat16;
    return fits && numbers && shared == Shared::kExpand && d >= kTileDepth &&
           bfloat16_gram_rows() != nullptr;
  }

  // rows [batch, shared, features], one fewer than the factor has if a one is behind them.
  void add(const at::Tensor& rows, const at::Tensor& factor) const {
    const int64_t count = rows.size(0) * rows.size(1), features = rows.size(2);
    const at::Tensor x = rows.reshape({count, features});
    for (int64_t first = 0; first < count; first += kRows) {
      add_gram(product_with(factor, x.narrow(0, first, std::min(kRows, count - first))));
    }
    if (!is_toeplitz()) AtenMath::mirror(statistic_, layout_.dim);
  }

 private:
  // Up to this size FFTs were slower, with tiles and without.
  static constexpr int64_t kWidestToeplitz = 1536;
  // Rows of X at a time, which bounds the memory of Y, and rows of Y^T Y.
  static constexpr int64_t kRows = 4096, kStrip = 64;

  struct Sums;  // whose memory outlives the call
  struct Diagonals;

  bool is_toeplitz() const { return layout_.family == Family::kToeplitz; }

  // X K.
  at::Tensor product_with(const at::Tensor& factor, const at::Tensor& x) const {
    const int64_t d = layout_.dim, features = x.size(1);
    if (is_toeplitz()) {
      const at::Tensor y = at::empty({x.size(0), d}, x.options());
      ToeplitzPanels(factor.const_data_ptr<at::BFloat16>(), d, !layout_.transposed)
          .multiply(Side::kRight, x, y);
      return y;
    }
    const at::Tensor k = factor.view({d, d});
    return features == d ? at::mm(x, k) : at::addmm(k[features], x, k.narrow(0, 0, features));
  }

  // The rows of Y^T Y from the diagonal on, in strips, of which the first are the longest. A strip
  // of a Toeplitz factor's has sums of diagonals of its own.
  void add_gram(const at::Tensor& y) const {
    const at::Tensor batch = y.unsqueeze(0);
    const RowsView view = rows_view(batch, Shared::kExpand);
    const int64_t d = layout_.dim, strips = (d + kStrip - 1) / kStrip;
    float* diagonals = is_toeplitz() ? thread_scratch<float, Diagonals>(strips * d) : nullptr;
    Shares<int64_t> shares;
    const auto count = static_cast<size_t>(strips);
    shares.begin(std::min(count, static_cast<size_t>(at::get_num_threads())), count);
    shares.add(0, count, 0, [](size_t i) { return static_cast<int64_t>(i); });
    shares.run([&](int64_t i, size_t) {
      add_strip(view, i * kStrip, is_toeplitz() ? diagonals + i * d : nullptr);
    });
    for (int64_t i = 0; diagonals != nullptr && i < strips; ++i) {
      plain_.add(diagonals + i * d, d, statistic_);
    }
  }

  // To `diagonals`, or where it is null to H.
  void add_strip(const RowsView& y, int64_t begin, float* diagonals) const {
    const int64_t d = layout_.dim, end = std::min(d, begin + kStrip), width = padded(d - begin);
    float* sums = thread_scratch<float, Sums>((end - begin) * width);
    std::fill_n(sums, (end - begin) * width, 0.0f);
    gram_rows_(y, d, begin, end, sums, thread_scratch<float>(kChunkDepth * spaced(d - begin)));
    if (diagonals != nullptr) std::fill_n(diagonals, d, 0.0f);
    for (int64_t i = begin; i < end; ++i) {
      plain_.add(sums + (i - begin) * (width + 1), d - i,
                 diagonals != nullptr ? diagonals : statistic_ + i * (d + 1));
    }
  }

  GramRows* const gram_rows_ = bfloat16_gram_rows();
  const StatisticKernels<float>& plain_ = kernels().statistic<float>();
  const Layout& layout_;
  float* statistic_;
};

}  // namespace singd::cpu
