// What the families of csrc/structures take from ATen: matrix products, FFTs, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/conj_physical.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/fft_irfft.h>
#include <ATen/ops/fft_rfft.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../structures/layout.h"
#include "../structures/matrix_view.h"
#include "../structures/toeplitz.h"
#include "aten_product.h"
#include "rows.h"
#include "thread_scratch.h"
#include "toeplitz_product.h"

namespace singd::cpu {

template <class T>
constexpr at::ScalarType scalar_type() {
  return c10::CppTypeToScalarType<std::remove_const_t<T>>::value;
}

// The type in which tensors of this dtype are computed with.
inline at::ScalarType compute_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls f(float{}) or f(double{}) for a type from compute_type.
template <class Function>
decltype(auto) dispatch_compute(at::ScalarType dtype, Function&& f) {
  return dtype == at::kDouble ? f(double{}) : f(float{});
}

struct AtenMath {
  // Dimension up to which Toeplitz products go through a dense d x d copy instead of the FFT.
  // Measured on one AVX-512 core in float32: the statistic is as fast either way at d = 512, K X at
  // 384 and X K at about 200; at 256 all of them together are faster through the copy.
  static constexpr int64_t kDirectToeplitz = 256;
  // Dimensions up to which float32 panels of it are faster than the FFT where oneDNN multiplies
  // them. Measured on an AMD EPYC; on the left the FFT takes two transposes.
  static constexpr int64_t kPanelsFromLeft = 850, kPanelsFromRight = 600;
  // Numbers that are transformed at a time: a spectrum of that size stays in a cache, where one of
  // a whole matrix is new memory for every call.
  static constexpr int64_t kTransformed = int64_t{1} << 18;
  // Elements of elementwise work below which a further thread costs more than it saves.
  static constexpr int64_t kGrain = 32768;

  // C = A B, m x k times k x n, for a batch of equal matrices.
  template <class A, class B, class T>
  static void multiply(int64_t m, int64_t n, int64_t k, MatrixView<A> a, MatrixView<B> b,
                       MatrixView<T> c, int64_t batch = 1) {
    at::Tensor out = tensor(c, m, n, batch);
    batch == 1 ? product_out(tensor(a, m, k, batch), tensor(b, k, n, batch), out)
               : void(at::bmm_out(out, tensor(a, m, k, batch), tensor(b, k, n, batch)));
  }

  // C += A B. ATen's batched product would add term by term to C; a product of its own keeps the
  // rounding of long sums down.
  template <class A, class B, class T>
  static void multiply_add(int64_t m, int64_t n, int64_t k, MatrixView<A> a, MatrixView<B> b,
                           MatrixView<T> c, int64_t batch = 1) {
    at::Tensor out = tensor(c, m, n, batch);
    const at::Tensor left = tensor(a, m, k, batch), right = tensor(b, k, n, batch);
    if (batch > 1) {
      out.add_(at::bmm(left, right));
    } else if (multiplies_in_onednn(scalar_type<T>(), m * n * k)) {
      out.add_(product(left, right));
    } else {
      out.addmm_(left, right);
    }
  }

  // C = A^T B or C += A^T B for k x d matrices whose product is known to be symmetric, as C is,
  // which has its rows side by side: panels of one triangle, mirrored.
  template <class A, class B, class T>
  static void multiply_symmetric(int64_t d, int64_t k, MatrixView<A> a, MatrixView<B> b,
                                 MatrixView<T> c, bool add) {
    at::Tensor left = tensor(a.transpose(), d, k, 1), right = tensor(b, k, d, 1);
    const int64_t widest = panel_width(d);
    if constexpr (std::is_same_v<T, float>) {
      if (multiplies_in_onednn(at::kFloat, d * widest * k)) {
        if (a.column_stride == 1) left = turned<float>(a.data, k, d, a.row_stride);
        if (a.data == b.data) right = left.t();  // of which columns lie side by side
      }
    }
    at::Tensor out = tensor(c, d, d, 1), panel;
    for (int64_t begin = 0; begin < d; begin += widest) {
      const int64_t width = std::min(widest, d - begin), end = begin + width;
      panel = out.narrow(0, 0, end).narrow(1, begin, width);
      if (add) {
        panel.add_(product(left.narrow(0, 0, end), right.narrow(1, begin, width)));
      } else {
        product_out(left.narrow(0, 0, end), right.narrow(1, begin, width), panel);
      }
    }
    mirror(c.data, d);
  }

  // The lower triangle of a square matrix, from its upper one. Strips of rows go to threads in
  // pairs, a long one with a short one.
  template <class T>
  static void mirror(T* square, int64_t d) {
    constexpr int64_t kStrip = 64;
    const int64_t strips = (d + kStrip - 1) / kStrip;
    const auto mirror_strip = [&](int64_t i) {
      kernels().mirror(square, sizeof(T), d, i * kStrip, std::min(d, (i + 1) * kStrip));
    };
    parallel_for((strips + 1) / 2, d * kStrip, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        mirror_strip(i);
        if (strips - 1 - i != i) mirror_strip(strips - 1 - i);
      }
    });
  }

  // to += factor from.
  template <class T>
  static void add_scaled(const T* from, int64_t count, double factor, T* to) {
    tensor(MatrixView<T>{to, count}, 1, count, 1)
        .add_(tensor(MatrixView<const T>{from, count}, 1, count, 1), factor);
  }

  // f(begin, end) over [0, count) in threads; `cost` is the work of one item in elements.
  template <class Function>
  static void parallel_for(int64_t count, int64_t cost, Function f) {
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain / (cost + 1)), f);
  }

  // y[j] = sum_i a[j - i] x[i] along the structured dimension (causal), or sum_i a[i - j] x[i].
  // Left: x and y are d x other. Right: they are other x d.
  template <class T>
  static void convolve(const T* a, int64_t d, Side side, bool causal, const T* x, T* y,
                       int64_t other) {
    const bool left = side == Side::kLeft;
    if (d <= (left ? kPanelsFromLeft : kPanelsFromRight) &&
        multiplies_in_onednn(scalar_type<T>(), d * d * other / 2)) {
      const int64_t rows = left ? d : other, columns = left ? other : d;
      return ToeplitzPanels(a, d, causal)
          .multiply(side, tensor(MatrixView<const T>{x, columns}, rows, columns, 1),
                    tensor(MatrixView<T>{y, columns}, rows, columns, 1));
    }
    const int64_t n = fft_length(d);
    at::Tensor kernel = at::fft_rfft(tensor(MatrixView<const T>{a, d}, 1, d, 1), n, 1);
    if (!causal) kernel = at::conj_physical(kernel);
    const int64_t many = std::max<int64_t>(1, kTransformed / n);
    const auto turn = kernels().statistic<T>().turn;
    for (int64_t first = 0; first < other; first += many) {
      const int64_t count = std::min(many, other - first);
      const auto transform = [&](const at::Tensor& rows) {
        return at::fft_irfft(at::fft_rfft(rows, n, 1).mul_(kernel), n, 1);
      };
      if (side == Side::kRight) {
        const at::Tensor rows = tensor(MatrixView<const T>{x + first * d, d}, count, d, 1);
        tensor(MatrixView<T>{y + first * d, d}, count, d, 1).copy_(transform(rows).narrow(1, 0, d));
        continue;
      }
      // FFTs along columns are several times slower than two transposes.
      const at::Tensor result = transform(turned(x + first, d, count, other)).contiguous();
      const T* numbers = result.const_data_ptr<T>();
      parallel_for(d, count, [&](int64_t begin, int64_t end) {
        turn(numbers + begin, count, end - begin, n, y + begin * other + first, other);
      });
    }
  }

  // out[l] += sum over the m rows of sum_i y[i] y[i + l]. Power spectra are summed in float64:
  // rounding there would spread over all l, also where few terms make out[l].
  template <class T>
  static void add_autocorrelation(const T* y, int64_t m, int64_t d, T* out) {
    const int64_t n = fft_length(d), frequencies = n / 2 + 1;
    const at::Tensor spectrum =
        at::view_as_real(at::fft_rfft(tensor(MatrixView<const T>{y, d}, m, d, 1), n, 1))
            .contiguous();
    const at::Tensor squares = column_squares(spectrum.view({m, 2 * frequencies}));
    const at::Tensor power = squares.view({frequencies, 2}).sum(1);
    const at::Tensor sums = at::fft_irfft(power.to(at::kComplexDouble), n, 0).narrow(0, 0, d);
    tensor(MatrixView<T>{out, d}, 1, d, 1).add_(sums);
  }

  // out[l] = sum_t a[t] b[t + l].
  static void correlate(const double* a, const double* b, int64_t d, double* out) {
    convolve(a, d, Side::kRight, false, b, out, 1);
  }

 private:
  // The columns of a matrix as rows.
  template <class T>
  static at::Tensor turned(const T* matrix, int64_t rows, int64_t columns, int64_t stride) {
    const at::Tensor out = at::empty({columns, rows}, scalar_type<T>());
    T* to = out.mutable_data_ptr<T>();
    parallel_for(columns, rows, [&](int64_t begin, int64_t end) {
      kernels().statistic<T>().turn(matrix + begin, rows, end - begin, stride, to + begin * rows,
                                    rows);
    });
    return out;
  }

  // In float64, [columns].
  static at::Tensor column_squares(const at::Tensor& rows) {
    const int64_t columns = rows.size(1);
    const at::Tensor sums = at::zeros({columns}, rows.options().dtype(at::kDouble));
    const RowsView view = rows_view(rows.unsqueeze(0), Shared::kExpand);
    at::parallel_for(0, columns, 512, [&](int64_t begin, int64_t end) {
      kernels().statistic<double>().diagonal(view, {0, view.count, begin, end},
                                             sums.mutable_data_ptr<double>(),
                                             thread_scratch<double>(padded(end - begin)));
    });
    return sums;
  }

  template <class T>
  static at::Tensor tensor(MatrixView<T> view, int64_t rows, int64_t columns, int64_t batch) {
    auto* data = const_cast<std::remove_const_t<T>*>(view.data);
    const auto options = at::TensorOptions().dtype(scalar_type<T>());
    if (batch == 1) {
      return at::from_blob(data, {rows, columns}, {view.row_stride, view.column_stride}, options);
    }
    return at::from_blob(data, {batch, rows, columns},
                         {view.batch_stride, view.row_stride, view.column_stride}, options);
  }
};

}  // namespace singd::cpu
