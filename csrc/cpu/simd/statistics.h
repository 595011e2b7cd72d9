// Statistics of rows X.

template <class T>
void add_numbers(const T* from, int64_t count, T* to) {
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) to[j] += from[j];
}

// Column squares of a chunk of rows, of which row_at(r) is the r-th.
template <class T, class RowAt>
SINGD_INLINE void add_chunk_squares(RowAt row_at, int64_t count, int64_t columns, T* partial,
                                    T* sums) {
  const auto square = [](auto number) {
    const T x = static_cast<T>(widen(number));
    return x * x;
  };
  SINGD_COUNT(elements, count * columns);
  for (int64_t j = 0; j < columns; ++j) partial[j] = T(0);
  const auto add_four = [&](int64_t r0, int64_t r1, int64_t r2, int64_t r3) {
    const auto *x0 = row_at(r0), *x1 = row_at(r1), *x2 = row_at(r2), *x3 = row_at(r3);
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      partial[j] += (square(x0[j]) + square(x1[j])) + (square(x2[j]) + square(x3[j]));
    }
  };
  const auto add_one = [&](int64_t r) {
    const auto* x = row_at(r);
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) partial[j] += square(x[j]);
  };
  for_each_four(count, add_four, add_one);
  add_numbers(partial, columns, sums);
}

// Plain rows are read where they are, others gathered first; the bits are the same.
template <class T>
void diagonal_statistic(const RowsView& rows, const Panel& part, T* sums, T* scratch) {
  if (rows.feature_stride == 1 && !rows.reduce) {
    const int64_t begin = part.column_begin;
    const int64_t columns = smaller(part.column_end, rows.features) - begin;
    with_type(rows.array, [&](const auto* data) {
      for_each_chunk<T>(part.row_begin, part.row_end, [&](int64_t first, int64_t count) {
        const auto row_at = [&](int64_t r) { return row_start(rows, data, first + r) + begin; };
        add_chunk_squares(row_at, count, columns, scratch, sums + begin);
      });
    });
    if (part.column_end > rows.features) {
      sums[rows.features] += static_cast<T>(part.row_end - part.row_begin);
    }
    return;
  }
  for_each_chunk<T>(part.row_begin, part.row_end, [&](int64_t first, int64_t count) {
    for_each_panel(part, 1, [&](int64_t begin, int64_t end) {
      const int64_t width = padded(end - begin);
      load_rows(rows, first, count, begin, end, scratch, width);
      add_chunk_squares([&](int64_t r) { return scratch + r * width; }, count, end - begin,
                        scratch + kChunkDepth * width, sums + begin);
    });
  });
}

// The statistic of blocks from their sums, of which one triangle is there.
template <class T>
void finish_blocks(const Layout& layout, const T* sums, int64_t begin, int64_t end, T* blocks) {
  const int64_t k = layout.block;
  for (int64_t at = begin; at < end; at += k) {
    const int64_t size = smaller(k, layout.dim - at), width = padded(size);
    const T* sum = sums + at / k * k * padded(k);
    T* block = blocks + at * k;  // the last one alone is smaller
    for (int64_t i = 0; i < size; ++i) {
      const int64_t there = i / kLanes<T> * kLanes<T>;  // first column that is there
      for (int64_t j = 0; j < there; ++j) block[i * size + j] += sum[j * width + i];
      for (int64_t j = there; j < size; ++j) block[i * size + j] += sum[i * width + j];
    }
  }
}

// Rows [first, first + count) of S = X E^T, with E also as its transpose V [dim, padded(border)].
template <class T>
void border_rows(const RowsView& rows, const Layout& layout, const T* e, const T* v, int64_t first,
                 int64_t count, T* s, T* scratch) {
  const int64_t d = layout.dim, stride = padded(d);
  const int64_t b = layout.head + layout.tail, thin = padded(b);
  const bool few = b <= kFewColumns;
  T* few_rows = scratch + kProductRows * stride;  // of E, padded
  for (int64_t r = 0; few && r < b; ++r) {
    load_row(e + r * d, d, T(1), few_rows + r * stride);
    for (int64_t j = d; j < stride; ++j) few_rows[r * stride + j] = T(0);
  }
  for (int64_t at = 0; at < count; at += kProductRows) {
    const int64_t size = smaller(kProductRows, count - at);
    T* to = s + (first + at) * thin;
    load_rows(rows, first + at, size, 0, d, scratch, stride);
    if (few) {
      multiply_few<T>(size, b, d, scratch, stride, few_rows, stride, to, thin);
    } else {
      multiply<T>(size, thin, d, {scratch, stride, 1}, v, thin, to, thin, kOverwrite<T>);
    }
  }
}

// The statistic of a row border, or rows [begin, end) of it: the sums as they are, and behind the
// border's rows squares on the interior alone.
template <class T>
void finish_row_border(const Layout& layout, const T* sums, int64_t begin, int64_t end,
                       T* statistic) {
  const int64_t d = layout.dim, b = layout.head + layout.tail, wide = padded(d);
  for (int64_t r = begin; r < smaller(end, b); ++r) {
    add_numbers(sums + r * wide, d, statistic + r * d);
  }
  if (end > b) add_numbers(sums + b * wide + layout.head, d - b, statistic + b * d);
}

// H[B, :] += T K and diag(H) += D^2 squares on the interior, for the column-bordered K = R^T with
// the stored R = [E; D]; `factor` is that storage, `v` its E transposed, T the sums' products.
template <class T>
void finish_column_border(const Layout& layout, const T* factor, const T* v, const T* sums,
                          T* statistic, T* scratch) {
  const int64_t d = layout.dim, b = layout.head + layout.tail, thin = padded(b), wide = padded(d);
  const T *interior = factor + b * d - layout.head, *squares = sums + b * wide;
  multiply<T>(b, thin, d, {sums, wide, 1}, v, thin, scratch, thin, kOverwrite<T>);
  for (int64_t r = 0; r < b; ++r) {
    for (int64_t j = 0; j < d; ++j) {
      const bool inside = j >= layout.head && j < d - layout.tail;
      const int64_t c = j < layout.head ? j : j - (d - b);
      statistic[r * d + j] += inside ? sums[r * wide + j] * interior[j] : scratch[r * thin + c];
    }
  }
  for (int64_t j = layout.head; j < d - layout.tail; ++j) {
    statistic[b * d + j - layout.head] += interior[j] * squares[j] * interior[j];
  }
}

template <class T>
constexpr StatisticKernels<T> statistic_kernels() {
  return {load_rows<T>,         diagonal_statistic<T>,  gram_kernels<T, T>(), border_rows<T>,
          transpose_rows<T>,    transpose_padded<T>,    add_numbers<T>,       finish_blocks<T>,
          finish_row_border<T>, finish_column_border<T>};
}
