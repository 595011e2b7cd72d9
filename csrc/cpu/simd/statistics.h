// Statistics of rows X.

// Column squares of plain rows, which are read where they are.
template <class Stored, class T>
SINGD_INLINE void add_plain_squares(const RowsView& rows, const Stored* data, int64_t begin,
                                    int64_t end, T* partial, T* sums) {
  for_each_chunk<T>(0, rows.count, [&](int64_t first, int64_t count) {
    SINGD_COUNT(elements, count * (end - begin));
    for (int64_t j = 0; j < end - begin; ++j) partial[j] = T(0);
    for (int64_t r = first; r < first + count; ++r) {
      const Stored* row = row_start(rows, data, r) + begin;
#pragma GCC ivdep
      for (int64_t j = 0; j < end - begin; ++j) {
        const T x = static_cast<T>(widen(row[j]));
        partial[j] += x * x;
      }
    }
#pragma GCC ivdep
    for (int64_t j = 0; j < end - begin; ++j) sums[j] += partial[j];
  });
}

template <class T>
void diagonal_statistic(const RowsView& rows, int64_t begin, int64_t end, T* sums, T* scratch) {
  const int64_t stride = padded(end - begin);
  if (rows.feature_stride == 1 && !rows.reduce) {
    const int64_t features = smaller(end, rows.features);
    with_type(rows.array, [&](const auto* data) {
      add_plain_squares(rows, data, begin, features, scratch, sums + begin);
    });
    if (end > rows.features) sums[rows.features] += static_cast<T>(rows.count);
    return;
  }
  T* squares = scratch + kChunkDepth * stride;
  for (int64_t j = 0; j < stride; ++j) squares[j] = T(0);
  for_each_chunk<T>(0, rows.count, [&](int64_t first, int64_t count) {
    load_rows(rows, first, count, begin, end, scratch, stride);
    add_squares<T, T>(scratch, count, stride, stride, squares);
  });
#pragma GCC ivdep
  for (int64_t j = 0; j < end - begin; ++j) sums[begin + j] += squares[j];
}

// Rows [first, first + count) of S = X V with V [padded(dim), padded(border)].
template <class T>
void border_rows(const RowsView& rows, const Layout& layout, const T* v, int64_t first,
                 int64_t count, T* s, T* scratch) {
  const int64_t stride = padded(layout.dim), thin = padded(layout.head + layout.tail);
  for (int64_t at = 0; at < count; at += kProductRows) {
    const int64_t size = smaller(kProductRows, count - at);
    load_rows(rows, first + at, size, 0, layout.dim, scratch, stride);
    multiply<T>(size, thin, layout.dim, {scratch, stride, 1}, v, thin, s + (first + at) * thin,
                thin, kOverwrite<T>);
  }
}

// H[B, :] += T K and diag(H) += D^2 squares on the interior, for the column-bordered K = R^T with
// the stored R = [E; D]; `factor` is that storage, `v` its E transposed.
template <class T>
void finish_column_border(const Layout& layout, const T* factor, const T* v, const T* products,
                          const T* squares, T* statistic, T* scratch) {
  const int64_t d = layout.dim, b = layout.head + layout.tail, thin = padded(b);
  const T* interior = factor + b * d - layout.head;
  multiply<T>(b, thin, d, {products, d, 1}, v, thin, scratch, thin, kOverwrite<T>);
  for (int64_t r = 0; r < b; ++r) {
    for (int64_t j = 0; j < d; ++j) {
      const bool inside = j >= layout.head && j < d - layout.tail;
      const int64_t c = j < layout.head ? j : j - (d - b);
      statistic[r * d + j] += inside ? products[r * d + j] * interior[j] : scratch[r * thin + c];
    }
  }
  for (int64_t j = layout.head; j < d - layout.tail; ++j) {
    statistic[b * d + j - layout.head] += interior[j] * squares[j] * interior[j];
  }
}

template <class T>
constexpr StatisticKernels<T> statistic_kernels() {
  return {load_rows<T>,   diagonal_statistic<T>, gram_kernels<T, T>(),
          border_rows<T>, transpose_padded<T>,   finish_column_border<T>};
}
