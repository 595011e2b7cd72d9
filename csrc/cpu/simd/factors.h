// update_factors_ for diagonal, block-diagonal and bordered factors: H and Pi(K^T K), then the
// candidates of momentum and factor. Formulas are those of csrc/structures; K and what multiplies
// from the right have kPadding readable numbers behind them.

template <class T>
struct Numbers {
  T *k, *h, *gram;

  explicit Numbers(const FactorTask& task)
      : k(static_cast<T*>(task.k)),
        h(static_cast<T*>(task.h)),
        gram(static_cast<T*>(task.gram.data)) {}
};

// f(slot) for every diagonal entry of a diagonal or bordered factor.
template <class Function>
SINGD_INLINE void for_each_diagonal(const Layout& layout, Function f) {
  const int64_t d = layout.dim, border = layout.head + layout.tail;
  for (int64_t r = 0; r < border; ++r) f(r * d + (r < layout.head ? r : r + d - border));
  for (int64_t j = 0; j < d - border; ++j) f(border * d + j);
}

template <class T>
double mean_diagonal(const Layout& layout, const T* numbers) {
  double sum = 0;
  for_each_diagonal(layout, [&](int64_t slot) { sum += static_cast<double>(numbers[slot]); });
  return sum / static_cast<double>(layout.dim);
}

// ---- H = Pi(K^T U K) and Pi(K^T K) ----

template <class T>
void diagonal_curvature(const FactorTask& task, const T* u) {
  const Numbers<T> n(task);
  for (int64_t j = 0; j < task.layout.dim; ++j) {
    n.gram[j] = n.k[j] * n.k[j];
    n.h[j] = n.k[j] * u[j] * n.k[j];
  }
}

// A bordered matrix R = [E; D] in its storage, and what products with it share.
template <class T>
struct Border {
  int64_t d, head, tail, border, wide;

  explicit Border(const Layout& layout)
      : d(layout.dim),
        head(layout.head),
        tail(layout.tail),
        border(layout.head + layout.tail),
        wide(padded(layout.dim)) {}

  int64_t interior() const { return d - border; }
  int64_t index(int64_t r) const { return r < head ? r : r + d - border; }
  const T* diagonal(const T* storage) const { return storage + border * d; }

  // core = E[:, B].
  void gather_core(const T* storage, T* core) const {
    for (int64_t r = 0; r < border; ++r) {
      for (int64_t c = 0; c < border; ++c) core[r * border + c] = storage[r * d + index(c)];
    }
  }

  // E R' for R' = [E'; D'] : E[:, B] E' + E diag(D'), which is zero on the border; rows `wide`
  // apart. scratch: border^2 + wide.
  void multiply_rows(const T* e, const T* other, T* to, T* scratch) const {
    T *core = scratch, *scale = scratch + border * border;
    gather_core(e, core);
    for (int64_t j = 0; j < wide; ++j) scale[j] = T(0);
    for (int64_t j = 0; j < interior(); ++j) scale[head + j] = diagonal(other)[j];
    for (int64_t r = 0; r < border; ++r) {
      for (int64_t j = 0; j < wide; ++j) to[r * wide + j] = j < d ? e[r * d + j] : T(0);
    }
    multiply<T>(border, wide, border, {core, border, 1}, other, d, to, wide, {true, scale});
  }

  // Rows `wide` apart to the storage, times the weights of Pi.
  void store_weighted(const T* from, T* to) const {
    for (int64_t r = 0; r < border; ++r) {
      const bool is_tail = r >= head;
      const T* row = from + r * wide;
      T* out = to + r * d;
      const int64_t end = d - tail;
      copy_scaled(row + head, interior(), T(2), out + head);
      if (is_tail) {
        for (int64_t j = 0; j < head; ++j) out[j] = T(0);
      } else {
        copy_scaled(row, head, T(1), out);
      }
      copy_scaled(row + end, tail, T(is_tail ? 1 : 2), out + end);
    }
  }
};

// scratch: 2 border wide + 2 border^2 + wide.
template <class T>
void row_border_curvature(const FactorTask& task, const T* u, T* scratch) {
  const Numbers<T> n(task);
  const Border<T> b(task.layout);
  const int64_t area = b.border * b.wide;
  T *product = scratch, *result = product + area, *core = result + area;
  T* rest = core + b.border * b.border;  // holds U[B, B] first
  const T *diagonal = b.diagonal(n.k), *u_diagonal = b.diagonal(u);
  b.gather_core(n.k, core);
  const Operand<T> core_transposed{core, 1, b.border};
  b.multiply_rows(u, n.k, product, rest);
  multiply<T>(b.border, b.wide, b.border, core_transposed, product, b.wide, result, b.wide,
              kOverwrite<T>);
  b.store_weighted(result, n.h);
  multiply<T>(b.border, b.wide, b.border, {rest, b.border, 1}, n.k, b.d, product, b.wide,
              kOverwrite<T>);
  T *h = n.h + b.border * b.d, *gram = n.gram + b.border * b.d;
  for (int64_t j = 0; j < b.interior(); ++j) {
    h[j] = diagonal[j] * u_diagonal[j] * diagonal[j];
    gram[j] = diagonal[j] * diagonal[j];
  }
  for (int64_t r = 0; r < b.border; ++r) {
    const T *e = n.k + r * b.d + b.head, *v = product + r * b.wide + b.head;
    const T* u_row = u + r * b.d + b.head;
#pragma GCC ivdep
    for (int64_t j = 0; j < b.interior(); ++j) {
      h[j] += e[j] * (v[j] + 2 * diagonal[j] * u_row[j]);
      gram[j] += e[j] * e[j];
    }
  }
  multiply<T>(b.border, b.wide, b.border, core_transposed, n.k, b.d, result, b.wide, kOverwrite<T>);
  b.store_weighted(result, n.gram);
}

// K = R^T: the statistic is H, and K^T K = R R^T. scratch: border wide + (border + d)
// padded(border).
template <class T>
void column_border_curvature(const FactorTask& task, const T* u, T* scratch) {
  const Numbers<T> n(task);
  const Border<T> b(task.layout);
  const int64_t thin = padded(b.border);
  T *rows = scratch, *core = rows + b.border * b.wide, *transposed = core + b.border * thin;
  for (int64_t r = 0; r < b.border; ++r) {
    __builtin_memcpy(rows + r * b.wide, u + r * b.d, sizeof(T) * static_cast<size_t>(b.d));
  }
  b.store_weighted(rows, n.h);
  copy_scaled(b.diagonal(u), b.interior(), T(1), n.h + b.border * b.d);
  transpose_padded(n.k, b.border, b.d, b.d, transposed, thin);
  multiply<T>(b.border, thin, b.d, {n.k, b.d, 1}, transposed, thin, core, thin, kOverwrite<T>);
  const T* diagonal = b.diagonal(n.k);
  for (int64_t r = 0; r < b.border; ++r) {
    T* row = rows + r * b.wide;
    for (int64_t c = 0; c < b.border; ++c) row[b.index(c)] = core[r * thin + c];
    for (int64_t j = 0; j < b.interior(); ++j) {
      row[b.head + j] = n.k[r * b.d + b.head + j] * diagonal[j];
    }
  }
  b.store_weighted(rows, n.gram);
  for (int64_t j = 0; j < b.interior(); ++j) {
    n.gram[b.border * b.d + j] = diagonal[j] * diagonal[j];
  }
}
