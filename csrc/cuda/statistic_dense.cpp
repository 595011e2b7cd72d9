// Dense and triangular structures: H = K^T X^T X K by library products. Of a symmetric product only
// the column panels on and above the diagonal are computed, and mirrored.
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>

#include "runtime.h"
#include "statistic.h"

namespace singd::cuda {
namespace {

constexpr int64_t kPanel = 1024;

// A^T B for [m, a] and [m, b] of one dtype, in float32 or float64 whatever that is.
at::Tensor transposed_product(const at::Tensor& a, const at::Tensor& b) {
  const bool low = a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf;
  if (!low) return at::mm(a.t(), b);
  if (a.is_cuda()) return at::mm(a.t(), b, at::kFloat);  // the tensor cores sum in float32
  return at::mm(a.to(at::kFloat).t(), b.to(at::kFloat));
}

// h += Y^T Y, h [d, d].
void add_symmetric_product(const at::Tensor& h, const at::Tensor& y) {
  const int64_t d = y.size(1);
  for (int64_t begin = 0; begin < d; begin += kPanel) {
    const int64_t count = std::min(kPanel, d - begin), right = begin + count;
    const at::Tensor panel =
        transposed_product(y.narrow(1, begin, count), y.narrow(1, begin, d - begin));
    h.narrow(0, begin, count).narrow(1, begin, d - begin).add_(panel);
    h.narrow(0, right, d - right)
        .narrow(1, begin, count)
        .add_(panel.narrow(1, count, d - right).t());
  }
}

// u += X^T X with the column of ones: the sums of the columns and the number of rows.
void add_gram(const at::Tensor& u, const RowMatrix& x) {
  const int64_t f = x.rows.features;
  const at::Tensor matrix = x.tensor.reshape({x.rows.count, f});
  add_symmetric_product(u.narrow(0, 0, f).narrow(1, 0, f), matrix);
  const double ones = x.rows.ones;
  if (ones == 0) return;
  const std::array<int64_t, 1> summed = {0};  // a braced {0} could be a null pointer
  const at::Tensor sums =
      at::sum(matrix, at::IntArrayRef(summed), false, u.scalar_type()).mul_(ones);
  u.select(0, f).narrow(0, 0, f).add_(sums);
  u.select(1, f).narrow(0, 0, f).add_(sums);
  u.select(0, f).narrow(0, f, 1).add_(static_cast<double>(x.rows.count) * ones * ones);
}

}  // namespace

void accumulate_dense(const at::Tensor& statistic, const RowMatrix& x, const at::Tensor* factor) {
  const int64_t d = x.rows.dim(), m = x.rows.count;
  at::Tensor h = statistic.view({d, d});
  if (factor == nullptr) return add_gram(h, x);
  const at::Tensor k = factor->view({d, d});
  if (m > 2 * d) {  // U = X^T X first: m d^2 / 2 + 2 d^3 products
    const at::Tensor u = at::zeros({d, d}, h.options());
    add_gram(u, x);
    h.addmm_(k.t(), at::mm(u, k));
  } else {  // Y = X K first: 3/2 m d^2 products
    const at::Tensor rows = loaded_rows(x, 0, m, padded_width(d)).narrow(1, 0, d);
    add_symmetric_product(h, at::mm(rows, k));
  }
}

}  // namespace singd::cuda
