// The statistic of a border of one row or column: column squares of X and its product with one
// column, its own or a `given` one. Rows whose features lie side by side are read where they are,
// as those of diagonal statistics.

// Of a chunk of rows, of which row_at(r) is the r-th and factor(r) its number in that column;
// partial: 2 * columns.
template <class T, class RowAt, class Factor>
SINGD_INLINE void add_chunk_beside_one(RowAt row_at, Factor factor, int64_t count, int64_t columns,
                                       T* partial, T* products, T* squares) {
  SINGD_COUNT(elements, count * columns);
  SINGD_COUNT(multiply_adds, count * columns);
  T *product = partial, *square = partial + columns;
  for (int64_t j = 0; j < 2 * columns; ++j) partial[j] = T(0);
  const auto add_four = [&](int64_t r0, int64_t r1, int64_t r2, int64_t r3) {
    const auto *x0 = row_at(r0), *x1 = row_at(r1), *x2 = row_at(r2), *x3 = row_at(r3);
    const T f0 = factor(r0), f1 = factor(r1), f2 = factor(r2), f3 = factor(r3);
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      const T a = static_cast<T>(widen(x0[j])), b = static_cast<T>(widen(x1[j]));
      const T c = static_cast<T>(widen(x2[j])), d = static_cast<T>(widen(x3[j]));
      product[j] += (f0 * a + f1 * b) + (f2 * c + f3 * d);
      square[j] += (a * a + b * b) + (c * c + d * d);
    }
  };
  const auto add_one = [&](int64_t r) {
    const auto* x = row_at(r);
    const T f = factor(r);
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      const T a = static_cast<T>(widen(x[j]));
      product[j] += f * a;
      square[j] += a * a;
    }
  };
  for_each_four(count, add_four, add_one);
  for (int64_t j = 0; j < columns; ++j) products[j] += product[j];
  for (int64_t j = 0; j < columns; ++j) squares[j] += square[j];
}

template <class T>
void one_border_statistic(const RowsView& rows, const Layout& layout, const T* given,
                          const Panel& part, T* sums, T* scratch) {
  const int64_t begin = part.column_begin, border = layout.head == 1 ? 0 : layout.dim - 1;
  const int64_t columns = larger<int64_t>(0, smaller(part.column_end, rows.features) - begin);
  const T one = static_cast<T>(rows.one);
  T *products = sums, *squares = sums + padded(layout.dim);
  with_type(rows.array, [&](const auto* data) {
    for_each_chunk<T>(part.row_begin, part.row_end, [&](int64_t first, int64_t count) {
      const auto row_at = [&](int64_t r) { return row_start(rows, data, first + r) + begin; };
      const auto factor = [&](int64_t r) {
        if (given != nullptr) return given[(first + r) * padded(1)];
        return border < rows.features ? static_cast<T>(widen(row_at(r)[border - begin])) : one;
      };
      add_chunk_beside_one(row_at, factor, count, columns, scratch, products + begin,
                           squares + begin);
      if (part.column_end <= rows.features) return;  // without the column of the ones
      T sum = 0;
      for (int64_t r = 0; r < count; ++r) sum += factor(r);
      products[rows.features] += sum * one;
      squares[rows.features] += static_cast<T>(count) * one * one;
    });
  });
}
