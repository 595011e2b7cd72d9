// Statistics of rows X: they are brought chunk by chunk into scratch, padded with zeros to whole
// vectors, and multiplied there. Sums are taken over a chunk, then over chunks, which rounds less
// than one long sum.

// Row r of the matrix is position r % shared of sample r / shared; reduced rows are whole samples.
template <class Stored>
SINGD_INLINE const Stored* row_start(const RowsView& rows, const Stored* data, int64_t row) {
  if (rows.reduce) return data + row * rows.batch_stride;
  return data + row / rows.shared * rows.batch_stride + row % rows.shared * rows.shared_stride;
}

// Columns [begin, end) of the features of the given rows, added up over the shared positions if
// reduced. With strided features the rows are the inner loop: they tend to lie side by side.
template <class Stored, class T>
SINGD_INLINE void load_features(const RowsView& rows, const Stored* data, int64_t first,
                                int64_t count, int64_t begin, int64_t end, T* to, int64_t stride) {
  const int64_t step = rows.feature_stride;
  const int64_t uses = rows.reduce ? rows.shared : 1;
  const T scale = static_cast<T>(rows.scale);
  if (step == 1 && uses == 1) {
    for (int64_t r = 0; r < count; ++r) {
      load_row(row_start(rows, data, first + r) + begin, end - begin, scale, to + r * stride);
    }
    return;
  }
  if (step == 1) {
    for (int64_t r = 0; r < count; ++r) {
      const Stored* from = row_start(rows, data, first + r) + begin;
      T* row = to + r * stride;
      for (int64_t j = 0; j < end - begin; ++j) row[j] = T(0);
      for (int64_t s = 0; s < uses; ++s, from += rows.shared_stride) {
#pragma GCC ivdep
        for (int64_t j = 0; j < end - begin; ++j) row[j] += static_cast<T>(widen(from[j]));
      }
#pragma GCC ivdep
      for (int64_t j = 0; j < end - begin; ++j) row[j] *= scale;
    }
    return;
  }
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t r = 0; r < count; ++r) {
      const Stored* from = row_start(rows, data, first + r) + j * step;
      T sum = 0;
      for (int64_t s = 0; s < uses; ++s) sum += static_cast<T>(widen(from[s * rows.shared_stride]));
      to[r * stride + j - begin] = scale * sum;
    }
  }
}

// Columns [begin, end) of rows [first, first + count), `stride` apart, with zeros between; the
// column behind the features is that of the ones.
template <class T>
void load_rows(const RowsView& rows, int64_t first, int64_t count, int64_t begin, int64_t end,
               T* to, int64_t stride) {
  SINGD_COUNT(elements, count * stride);
  const int64_t features = smaller(end, rows.features);
  if (begin < features) {
    with_type(rows.array, [&](const auto* data) {
      load_features(rows, data, first, count, begin, features, to, stride);
    });
  }
  const int64_t loaded = larger<int64_t>(features - begin, 0);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = loaded; j < stride; ++j) to[r * stride + j] = T(0);
    if (end > rows.features) to[r * stride + rows.features - begin] = static_cast<T>(rows.one);
  }
}

// sums[j] += sum over rows of x[r, j]^2; `partial` has `columns` numbers.
template <class T>
SINGD_INLINE void add_squares(const T* x, int64_t rows, int64_t stride, int64_t columns, T* partial,
                              T* sums) {
  SINGD_COUNT(elements, rows * columns);
#pragma GCC ivdep
  for (int64_t j = 0; j < columns; ++j) partial[j] = x[j] * x[j];
  for (int64_t r = 1; r < rows; ++r) {
    const T* row = x + r * stride;
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) partial[j] += row[j] * row[j];
  }
#pragma GCC ivdep
  for (int64_t j = 0; j < columns; ++j) sums[j] += partial[j];
}

// f(first row, rows) for chunks of all rows.
template <class Function>
SINGD_INLINE void for_each_chunk(int64_t count, Function f) {
  for (int64_t first = 0; first < count; first += kChunkRows) {
    f(first, smaller(kChunkRows, count - first));
  }
}

// Column squares of plain rows, which are read where they are.
template <class Stored, class T>
SINGD_INLINE void add_plain_squares(const RowsView& rows, const Stored* data, int64_t begin,
                                    int64_t end, T* partial, T* sums) {
  for_each_chunk(rows.count, [&](int64_t first, int64_t count) {
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
  T* partial = scratch + kChunkRows * stride;
  for_each_chunk(rows.count, [&](int64_t first, int64_t count) {
    load_rows(rows, first, count, begin, end, scratch, stride);
    add_squares(scratch, count, stride, end - begin, partial, sums + begin);
  });
}

// The blocks of X^T X in columns [begin, end), which are whole blocks.
template <class T>
void block_statistic(const RowsView& rows, const Layout& layout, int64_t begin, int64_t end,
                     T* blocks, T* scratch) {
  const int64_t stride = padded(end - begin) + kPadding, k = layout.block;
  T* gram = scratch + kChunkRows * stride;
  for_each_chunk(rows.count, [&](int64_t first, int64_t count) {
    load_rows(rows, first, count, begin, end, scratch, stride);
    for (int64_t at = begin; at < end; at += k) {
      const int64_t size = smaller(k, layout.dim - at);
      const T* x = scratch + at - begin;
      multiply<T>(size, padded(size), count, {x, 1, stride}, x, stride, gram, padded(size),
                  kOverwrite<T>);
      T* block = blocks + at / k * k * k;  // the last one alone is smaller
      for (int64_t i = 0; i < size; ++i) {
#pragma GCC ivdep
        for (int64_t j = 0; j < size; ++j) block[i * size + j] += gram[i * padded(size) + j];
      }
    }
  });
}

// Columns [begin, end) of E^T X, added to `products` [border, dim], and column squares, added to
// `squares` [dim]; E is [rows, padded(border)], or where it is null the border columns of X.
template <class T>
void border_statistic(const RowsView& rows, const Layout& layout, const T* left, int64_t begin,
                      int64_t end, T* products, T* squares, T* scratch) {
  const int64_t stride = padded(end - begin), b = layout.head + layout.tail, thin = padded(b);
  const int64_t d = layout.dim;
  T *border = scratch + kChunkRows * stride, *partial = border + kChunkRows * thin;
  T* sums = partial + stride;
  for_each_chunk(rows.count, [&](int64_t first, int64_t count) {
    load_rows(rows, first, count, begin, end, scratch, stride);
    const T* e = left + first * thin;
    if (left == nullptr) {
      e = border;
      load_rows(rows, first, count, 0, layout.head, border, thin);
      if (layout.tail > 0) {  // its padding ends where that of the head does
        load_rows(rows, first, count, d - layout.tail, d, sums, padded(layout.tail));
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t j = 0; j < layout.tail; ++j) {
            border[r * thin + layout.head + j] = sums[r * padded(layout.tail) + j];
          }
        }
      }
    }
    multiply<T>(b, stride, count, {e, 1, thin}, scratch, stride, sums, stride, kOverwrite<T>);
    for (int64_t i = 0; i < b; ++i) {
      T* row = products + i * d + begin;
#pragma GCC ivdep
      for (int64_t j = 0; j < end - begin; ++j) row[j] += sums[i * stride + j];
    }
    add_squares(scratch, count, stride, end - begin, partial, squares + begin);
  });
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
  return {load_rows<T>,   diagonal_statistic<T>, block_statistic<T>,     border_statistic<T>,
          border_rows<T>, transpose_padded<T>,   finish_column_border<T>};
}
