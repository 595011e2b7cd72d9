// Parts of X^T X: rows X are brought chunk by chunk into scratch, padded with zeros to whole
// vectors, and multiplied there. Sums are taken over a chunk, then over chunks, which rounds less
// than one long sum. Scratch holds elements In: T, or pairs of bfloat16 numbers.

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

template <class T>
SINGD_INLINE void add_numbers(int64_t count, const T* from, T* to) {
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) to[j] += from[j];
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

// The blocks of X^T X in columns [begin, end), which are whole blocks. What a vector takes from
// columns behind a block is multiplied too, and dropped.
template <class T, class In>
void block_statistic(const RowsView& rows, const Layout& layout, int64_t begin, int64_t end,
                     T* blocks, T* scratch) {
  const int64_t stride = padded(end - begin) + kPadding, k = layout.block, area = k * padded(k);
  const int64_t last = smaller(begin + padded(end - begin), layout.dim);
  In* x = as<In>(scratch);
  T *gram = scratch + kChunkDepth * stride, *sums = gram + area;
  for (int64_t i = 0; i < (end - begin + k - 1) / k * area; ++i) sums[i] = T(0);
  for_each_chunk<In>(0, rows.count, [&](int64_t first, int64_t count) {
    bring_rows(rows, first, count, begin, last, x, stride, stride);
    T* sum = sums;
    for (int64_t at = begin; at < end; at += k, sum += area) {
      const int64_t size = smaller(k, end - at);
      const In* columns = x + at - begin;
      multiply<T, In>(size, padded(size), depth_of<In>(count), {columns, 1, stride}, columns,
                      stride, gram, padded(size), kOverwrite<T>);
      add_numbers(size * padded(size), gram, sum);
    }
  });
  T* sum = sums;
  for (int64_t at = begin; at < end; at += k, sum += area) {
    const int64_t size = smaller(k, end - at);
    T* block = blocks + at / k * k * k;  // the last one alone is smaller
    for (int64_t i = 0; i < size; ++i) add_numbers(size, sum + i * padded(size), block + i * size);
  }
}

// The border columns of rows [first, first + count), `padded(border)` apart.
template <class T, class In>
void border_columns(const RowsView& rows, const Layout& layout, int64_t first, int64_t count,
                    T* to) {
  const int64_t d = layout.dim, thin = padded(layout.head + layout.tail);
  In* e = as<In>(to);
  bring_rows(rows, first, count, 0, layout.head, e, thin, thin);
  if (layout.tail == 0) return;
  bring_rows(rows, first, count, d - layout.tail, d, e + layout.head, thin, thin - layout.head);
}

// Columns [begin, end) of E^T X, added to `products` [border, dim], and column squares, added to
// `squares` [padded(dim)], for rows [first, first + count); E [count, padded(border)] is `left`.
template <class T, class In>
void border_statistic(const RowsView& rows, const Layout& layout, const T* left, int64_t first,
                      int64_t count, int64_t begin, int64_t end, T* products, T* squares,
                      T* scratch) {
  const int64_t stride = padded(end - begin), b = layout.head + layout.tail, thin = padded(b);
  In* x = as<In>(scratch);
  T* sums = scratch + kChunkDepth * stride;
  const In* e = as<In>(left);
  for_each_chunk<In>(first, first + count, [&](int64_t at, int64_t chunk) {
    const int64_t depth = depth_of<In>(chunk);
    bring_rows(rows, at, chunk, begin, end, x, stride, stride);
    multiply<T, In>(b, stride, depth, {e, 1, thin}, x, stride, sums, stride, kOverwrite<T>);
    e += depth * thin;
    for (int64_t i = 0; i < b; ++i) {
      add_numbers(end - begin, sums + i * stride, products + i * layout.dim + begin);
    }
    add_squares<T, In>(x, depth, stride, stride, squares + begin);
  });
}

template <class T, class In>
constexpr GramKernels<T> gram_kernels() {
  return {block_statistic<T, In>, border_columns<T, In>, border_statistic<T, In>};
}
