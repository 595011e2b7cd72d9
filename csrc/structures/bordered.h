// Bordered factors: rank-k triangular and hierarchical ones. The border B is the first `head` and
// the last `tail` indices; the interior I is the rest. A row-bordered matrix R is dense in the rows
// B and diagonal in the rows I:
//
//        head   I   tail
//      [  x     x    x  ]  head      The tail rows are zero in the head columns, which makes R
//  R = [  0     D    0  ]  I         hierarchical; with one of head and tail empty, R is
//      [  0     x    x  ]  tail      rank-k triangular.
//
// Storage: E = R[B, :] as (head + tail) x d row-major, then D. Column-bordered K is stored as
// R = K^T. The statistic has the shape of the storage: U[B, :] and diag(U)[I] for row-bordered K,
// H[B, :] and diag(H)[I] with H = K^T U K for column-bordered K.
#pragma once

#include "diagonal.h"
#include "entrywise.h"

namespace singd {

struct Bordered : Entrywise<Bordered> {
  Layout layout;

  explicit Bordered(const Layout& l) : layout(l) {}

  int64_t size() const { return border() * layout.dim + interior(); }

  std::vector<Section> sections() const {
    return {{"border", 0, {border(), layout.dim}},
            {"diagonal", border() * layout.dim, {interior()}}};
  }

  template <class Function>
  void for_each_entry(Function f) const {
    for_each_stored([&](int64_t slot, int64_t i, int64_t j, int weight) {
      if (weight == 0) return;
      layout.transposed ? f(slot, j, i, weight) : f(slot, i, j, weight);
    });
  }

  // Row-bordered: H[B, :] = R[B, B]^T U[B, :] R, and for j in I, with e = R[B, j]:
  // H[j, j] = e^T U[B, B] e + 2 D_j e^T U[B, j] + D_j^2 U[j, j].
  template <class Math, class T>
  void conjugate(const T* k, const T* statistic, T* h) const {
    if (layout.transposed) {
      std::copy(statistic, statistic + size(), h);
      return apply_stored_weights(h);
    }
    const int64_t d = layout.dim, b = border();
    const T *diagonal = k + b * d, *u_diagonal = statistic + b * d;
    std::vector<T> core(b * b), u_core(b * b), product_with_k(b * d), v(b * d);
    gather_core(k, core.data());
    gather_core(statistic, u_core.data());
    multiply<Math>(k, Side::kRight, false, statistic, product_with_k.data(), b);
    const MatrixView<const T> core_view{core.data(), b}, u_core_view{u_core.data(), b};
    Math::multiply(b, d, b, core_view.transpose(), MatrixView<const T>{product_with_k.data(), d},
                   MatrixView<T>{h, d});
    Math::multiply(b, d, b, u_core_view, MatrixView<const T>{k, d}, MatrixView<T>{v.data(), d});
    for (int64_t j = 0; j < interior(); ++j) {
      h[b * d + j] = diagonal[j] * u_diagonal[j] * diagonal[j];
    }
    for (int64_t r = 0; r < b; ++r) {
      const int64_t row = r * d + layout.head;
      for (int64_t j = 0; j < interior(); ++j) {
        h[b * d + j] += k[row + j] * (v[row + j] + 2 * diagonal[j] * statistic[row + j]);
      }
    }
    apply_stored_weights(h);
  }

  template <class Math, class T>
  void gram(const T* k, T* h) const {
    const int64_t d = layout.dim, b = border();
    if (!layout.transposed) {  // K^T K is K^T U K for U = I
      std::vector<T> identity(size(), T(0));
      for_each_stored([&](int64_t slot, int64_t i, int64_t j, int) {
        if (i == j) identity[slot] = T(1);
      });
      return conjugate<Math>(k, identity.data(), h);
    }
    // K^T K = R R^T: E E^T in the core, E[:, j] D_j beside it, D^2 on the interior.
    const T* diagonal = k + b * d;
    const MatrixView<const T> e{k, d};
    for_each_span([&](Span columns) {
      const MatrixView<const T> rows{k + columns.row * d, d};
      Math::multiply(b, columns.count, d, e, rows.transpose(), MatrixView<T>{h + columns.index, d});
    });
    for (int64_t r = 0; r < b; ++r) {
      const int64_t row = r * d + layout.head;
      for (int64_t j = 0; j < interior(); ++j) h[row + j] = k[row + j] * diagonal[j];
    }
    for (int64_t j = 0; j < interior(); ++j) h[b * d + j] = diagonal[j] * diagonal[j];
    apply_stored_weights(h);
  }

  // R_A R_B has the rows E_A R_B and the diagonal D_A D_B; (A B)^T = B^T A^T when transposed.
  template <class Math, class T>
  void product(const T* a, const T* b, T* c) const {
    if (layout.transposed) std::swap(a, b);
    const int64_t diagonal = border() * layout.dim;
    multiply_stored<Math>(b, Side::kRight, false, a, c, border());
    for (int64_t j = 0; j < interior(); ++j) c[diagonal + j] = a[diagonal + j] * b[diagonal + j];
  }

  template <class Math, class T>
  void multiply(const T* k, Side side, bool transpose, const T* x, T* y, int64_t other) const {
    multiply_stored<Math>(k, side, transpose != layout.transposed, x, y, other);
  }

 private:
  // One contiguous range of border indices: rows row.. of E are rows index.. of R.
  struct Span {
    int64_t row, index, count;
  };

  int64_t border() const { return layout.head + layout.tail; }
  int64_t interior() const { return layout.dim - border(); }

  template <class Function>
  void for_each_span(Function f) const {
    if (layout.head > 0) f(Span{0, 0, layout.head});
    if (layout.tail > 0) f(Span{layout.head, layout.dim - layout.tail, layout.tail});
  }

  // f(slot, i, j, weight) for every stored entry R[i, j], also the zeros (weight 0) of tail x head.
  template <class Function>
  void for_each_stored(Function f) const {
    const int64_t d = layout.dim, interior_end = d - layout.tail;
    for_each_span([&](Span rows) {
      const bool is_tail = rows.index > 0 || layout.head == 0;
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t slot = (rows.row + r) * d, i = rows.index + r;
        for (int64_t j = 0; j < layout.head; ++j) f(slot + j, i, j, is_tail ? 0 : 1);
        for (int64_t j = layout.head; j < interior_end; ++j) f(slot + j, i, j, 2);
        for (int64_t j = interior_end; j < d; ++j) f(slot + j, i, j, is_tail ? 1 : 2);
      }
    });
    for (int64_t j = 0; j < interior(); ++j) {
      f(border() * d + j, layout.head + j, layout.head + j, 1);
    }
  }

  template <class T>
  void apply_stored_weights(T* h) const {
    for_each_stored([&](int64_t slot, int64_t, int64_t, int weight) {
      h[slot] = weight == 0 ? T(0) : static_cast<T>(weight) * h[slot];
    });
  }

  // core = E[:, B].
  template <class T>
  void gather_core(const T* e, T* core) const {
    for (int64_t r = 0; r < border(); ++r) {
      for_each_span([&](Span columns) {
        std::copy_n(e + r * layout.dim + columns.index, columns.count,
                    core + r * border() + columns.row);
      });
    }
  }

  // y = op(R) x or y = x op(R).
  template <class Math, class T>
  void multiply_stored(const T* k, Side side, bool transpose, const T* x, T* y,
                       int64_t other) const {
    const int64_t d = layout.dim;
    const int64_t stride = side == Side::kLeft ? other : d;
    // Index i of the structured dimension lies at i * step in x and y.
    const int64_t step = side == Side::kLeft ? other : 1;
    const T* diagonal = k + border() * d;
    scale_by_diagonal<Math>(diagonal, interior(), side, x + layout.head * step,
                            y + layout.head * step, stride, other);
    const bool scatter = (side == Side::kLeft) == transpose;  // op(R) x = E^T x[B] + ..., or x[B] E
    if (scatter) {
      for_each_span(
          [&](Span rows) { clear(y + rows.index * step, side, rows.count, stride, other); });
    }
    for_each_span([&](Span rows) {
      const MatrixView<const T> e{k + rows.row * d, d}, all{x, stride};
      const MatrixView<const T> x_border{x + rows.index * step, stride};
      const MatrixView<T> y_border{y + rows.index * step, stride}, y_all{y, stride};
      if (side == Side::kLeft && !transpose) {
        Math::multiply(rows.count, other, d, e, all, y_border);
      } else if (side == Side::kLeft) {
        Math::multiply_add(d, other, rows.count, e.transpose(), x_border, y_all);
      } else if (!transpose) {
        Math::multiply_add(other, d, rows.count, x_border, e, y_all);
      } else {
        Math::multiply(other, rows.count, d, all, e.transpose(), y_border);
      }
    });
  }

  template <class T>
  static void clear(T* y, Side side, int64_t count, int64_t stride, int64_t other) {
    const int64_t rows = side == Side::kLeft ? count : other;
    const int64_t columns = side == Side::kLeft ? other : count;
    for (int64_t i = 0; i < rows; ++i) std::fill_n(y + i * stride, columns, T(0));
  }
};

}  // namespace singd
