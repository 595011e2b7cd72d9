// Parts of X^T X: rows X are brought into scratch, converted and padded with zeros to whole
// vectors, and multiplied there: a chunk of rows, which fits the second cache, in panels of
// columns, which fit the first. (Where they are, rows of a power of two of numbers would share few
// of its lines.) Sums are taken over a chunk, then over chunks, which rounds less than one long
// sum. Scratch holds elements In: T, or pairs of bfloat16 numbers.

// f(first row, rows) for chunks of the rows [begin, end): kChunkDepth rows of scratch.
template <class In, class Function>
SINGD_INLINE void for_each_chunk(int64_t begin, int64_t end, Function f) {
  constexpr int64_t kChunk = kChunkDepth * kRowsTogether<In>;
  for (int64_t first = begin; first < end; first += kChunk) f(first, smaller(kChunk, end - first));
}

// Rows of scratch that so many rows of X take.
template <class In>
constexpr int64_t depth_of(int64_t rows) {
  return (rows + kRowsTogether<In> - 1) / kRowsTogether<In>;
}

template <class T, class In, int kVectors>
SINGD_INLINE void add_squares_of(const In* x, int64_t depth, int64_t stride, T* sums) {
  Vector<T> partial[kVectors] = {};
  for (int64_t r = 0; r < depth; ++r, x += stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vector<In> row = load<In>(x + v * kLanes<T>);
      add_product(partial[v], row, row);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    store<T>(sums + v * kLanes<T>, load<T>(sums + v * kLanes<T>) + partial[v]);
  }
}

// sums[j] += sum over rows of x[r, j]^2 for whole vectors of columns.
template <class T, class In>
SINGD_INLINE void add_squares(const In* x, int64_t depth, int64_t stride, int64_t columns,
                              T* sums) {
  constexpr int64_t kWide = 4 * kLanes<T>;
  SINGD_COUNT(elements, depth * kRowsTogether<In> * columns);
  int64_t j = 0;
  for (; j + kWide <= columns; j += kWide) {
    add_squares_of<T, In, 4>(x + j, depth, stride, sums + j);
  }
  for (; j < columns; j += kLanes<T>) add_squares_of<T, In, 1>(x + j, depth, stride, sums + j);
}

// f(begin, end) for panels of a part's columns, of whole units, that fit a row of scratch.
template <class Function>
SINGD_INLINE void for_each_panel(const Panel& part, int64_t unit, Function f) {
  const int64_t step = larger<int64_t>(1, kChunkColumns / unit) * unit;
  for (int64_t begin = part.column_begin; begin < part.column_end; begin += step) {
    f(begin, smaller(begin + step, part.column_end));
  }
}

// sum += X^T X for a block X [depth, size] of scratch: of each vector's rows the columns from that
// vector on, since the rest is symmetric. What a vector takes from columns behind the block is
// multiplied too, and not used.
template <class T, class In>
SINGD_INLINE void add_block(const In* x, int64_t stride, int64_t depth, int64_t size, T* sum) {
  const int64_t width = padded(size);
  for (int64_t at = 0; at < size; at += kLanes<T>) {
    multiply<T, In>(smaller<int64_t>(kLanes<T>, size - at), width - at, depth, {x + at, 1, stride},
                    x + at, stride, sum + at * (width + 1), width, kAdd<T>);
  }
}

template <class T, class In>
void block_statistic(const RowsView& rows, const Layout& layout, const Panel& part, T* sums,
                     T* scratch) {
  const int64_t k = layout.block, area = k * padded(k);
  In* x = as<In>(scratch);
  for_each_chunk<In>(part.row_begin, part.row_end, [&](int64_t first, int64_t count) {
    for_each_panel(part, k, [&](int64_t begin, int64_t end) {
      const int64_t stride = padded(end - begin) + kPadding;
      const int64_t last = smaller(begin + padded(end - begin), layout.dim);
      bring_rows(rows, first, count, begin, last, x, stride, stride);
      for (int64_t at = begin; at < end; at += k) {
        add_block(x + at - begin, stride, depth_of<In>(count), smaller(k, end - at),
                  sums + at / k * area);
      }
    });
  });
}

// The border columns of rows [first, first + count), `padded(border)` apart.
template <class In>
SINGD_INLINE void bring_border(const RowsView& rows, const Layout& layout, int64_t first,
                               int64_t count, In* e) {
  const int64_t d = layout.dim, thin = padded(layout.head + layout.tail);
  bring_rows(rows, first, count, 0, layout.head, e, thin, thin);
  if (layout.tail == 0) return;
  bring_rows(rows, first, count, d - layout.tail, d, e + layout.head, thin, thin - layout.head);
}

template <class T, class In>
void border_statistic(const RowsView& rows, const Layout& layout, const T* given, const Panel& part,
                      T* sums, T* scratch) {
  const int64_t b = layout.head + layout.tail, thin = padded(b), wide = padded(layout.dim);
  In *e = as<In>(scratch), *x = as<In>(scratch + kChunkDepth * thin);
  for_each_chunk<In>(part.row_begin, part.row_end, [&](int64_t first, int64_t count) {
    const int64_t depth = depth_of<In>(count);
    // Of blocks this was slower.
    ask_for_rows(rows, first, count, part.column_begin, part.column_end);
    if (given == nullptr) bring_border(rows, layout, first, count, e);
    const In* left = given == nullptr ? e : as<In>(given + first * thin);
    for_each_panel(part, 1, [&](int64_t begin, int64_t end) {
      const int64_t width = padded(end - begin), stride = width + kPadding;
      bring_rows(rows, first, count, begin, end, x, stride, width);
      multiply<T, In>(b, width, depth, {left, 1, thin}, x, stride, sums + begin, wide, kAdd<T>);
      add_squares<T, In>(x, depth, stride, width, sums + b * wide + begin);
    });
  });
}

template <class T, class In>
constexpr GramKernels<T> gram_kernels() {
  return {block_statistic<T, In>, border_statistic<T, In>};
}
