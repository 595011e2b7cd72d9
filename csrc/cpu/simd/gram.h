// Parts of X^T X: rows X are brought into scratch, converted and padded with zeros to whole
// vectors, and multiplied there: a chunk of rows in panels of columns. (Where they are, rows of a
// power of two of numbers would share few lines of a cache.) Sums are taken over a chunk, then over
// chunks, which rounds less than one long sum. Scratch holds elements In: T, or pairs of bfloat16
// numbers.

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

constexpr int64_t kGramRows = 16;  // of a Gram matrix that are made at a time: of a tile

#if SINGD_TILES
// The rows of scratch behind the last pair, up to a whole tile, become zeros.
SINGD_INLINE void fill_tiles(Pair* x, int64_t depth, int64_t stride) {
  const int64_t rows = (depth + kTileRows - 1) / kTileRows * kTileRows - depth;
  __builtin_memset(x + depth * stride, 0, static_cast<size_t>(rows * stride) * sizeof(Pair));
}

// sums += L^T X for up to 16 columns L, whose tiles are transposed: those of further rows of X are
// `left_step` apart.
SINGD_INLINE void add_strip(int64_t rows, int64_t columns, int64_t depth, const Pair* left,
                            int64_t left_stride, int64_t left_step, const Pair* x, int64_t stride,
                            float* sums, int64_t sums_stride) {
  SINGD_COUNT(multiply_adds, rows * columns * depth);
  alignas(64) float products[4][kTileRows][16];
  for (int64_t j = 0; j < columns; j += 64) {
    const int64_t tiles = smaller<int64_t>(4, (columns - j) / 16);
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (int64_t p = 0; p < depth; p += kTileRows) {
      const Pair* right = x + p * stride + j;
      load_tile<4>(left + p / kTileRows * left_step, 4 * left_stride);
      load_tile<5>(right, 4 * stride);
      multiply_tiles<0, 4, 5>();
      if (tiles > 1) load_tile<6>(right + 16, 4 * stride);
      if (tiles > 1) multiply_tiles<1, 4, 6>();
      if (tiles > 2) load_tile<7>(right + 32, 4 * stride);
      if (tiles > 2) multiply_tiles<2, 4, 7>();
      if (tiles > 3) load_tile<5>(right + 48, 4 * stride);
      if (tiles > 3) multiply_tiles<3, 4, 5>();
    }
    store_tile<0>(products[0], 64);
    if (tiles > 1) store_tile<1>(products[1], 64);
    if (tiles > 2) store_tile<2>(products[2], 64);
    if (tiles > 3) store_tile<3>(products[3], 64);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t i = 0; i < rows; ++i) {
        float* to = sums + i * sums_stride + j + 16 * t;
        store<float>(to, load<float>(to) + load<float>(products[t][i]));
      }
    }
  }
}

// sums += rows [at, at + rows) of X^T X, from column `at` to `width`; up to 16 of them.
SINGD_INLINE void add_gram_rows(const Pair* x, int64_t stride, int64_t depth, int64_t at,
                                int64_t rows, int64_t width, float* sums) {
  constexpr int64_t kTile = kTileRows * 16;
  alignas(64) Pair left[kChunkDepth / kTileRows][kTile];
  for (int64_t p = 0; p < depth; p += kTileRows) {
    transpose_tile(x + p * stride + at, stride, left[p / kTileRows], 16);
  }
  add_strip(rows, width - at, depth, left[0], 16, kTile, x + at, stride, sums + at * (width + 1),
            width);
}

// sum += X^T X for a block, as below.
SINGD_INLINE void add_block(const Pair* x, int64_t stride, int64_t depth, int64_t size,
                            float* sum) {
  for (int64_t at = 0; at < size; at += kTileRows) {
    add_gram_rows(x, stride, depth, at, smaller(kTileRows, size - at), padded(size), sum);
  }
}

SINGD_INLINE void turn_border(Pair* e, int64_t depth, int64_t thin) {
  fill_tiles(e, depth, thin);
  for (int64_t p = 0; p < depth; p += kTileRows) {
    for (int64_t r = 0; r < thin; r += 16) {
      Pair* tile = e + p * thin + r;
      transpose_tile(tile, thin, tile, thin);
    }
  }
}

// sums += E^T X for a border whose tiles were turned.
SINGD_INLINE void add_border(int64_t border, int64_t width, int64_t depth, const Pair* e,
                             int64_t thin, const Pair* x, int64_t stride, float* sums,
                             int64_t sums_stride) {
  for (int64_t r = 0; r < border; r += kTileRows) {
    add_strip(smaller(kTileRows, border - r), width, depth, e + r, thin, kTileRows * thin, x,
              stride, sums + r * sums_stride, sums_stride);
  }
}
#else
template <class In>
SINGD_INLINE void fill_tiles(In*, int64_t, int64_t) {}
template <class In>
SINGD_INLINE void turn_border(In*, int64_t, int64_t) {}
#if SINGD_BFLOAT16_PRODUCTS
SINGD_INLINE void add_gram_rows(const Pair* x, int64_t stride, int64_t depth, int64_t at,
                                int64_t rows, int64_t width, float* sums) {
  multiply<float, Pair>(rows, width - at, depth, {x + at, 1, stride}, x + at, stride,
                        sums + at * (width + 1), width, kAdd<float>);
}
#endif
template <class T, class In>
SINGD_INLINE void add_border(int64_t border, int64_t width, int64_t depth, const In* e,
                             int64_t thin, const In* x, int64_t stride, T* sums,
                             int64_t sums_stride) {
  multiply<T, In>(border, width, depth, {e, 1, thin}, x, stride, sums, sums_stride, kAdd<T>);
}

// The last four rows of the first vector's, by both vectors, and kRows rows of the second one's, by
// that one: together they keep the processor as busy as a whole tile, which neither does alone.
template <class T, class In, int kRows>
SINGD_INLINE void add_corner(const In* x, int64_t stride, int64_t depth, int64_t rows, T* sum) {
  constexpr int kLane = kLanes<T>, kUpper = 4;
  Vector<T> upper[kUpper][2], lower[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kUpper; ++r) upper[r][0] = upper[r][1] = Vector<T>{};
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) lower[r] = Vector<T>{};
  for (int64_t p = 0; p < depth; ++p, x += stride) {
    const Vector<In> left = load<In>(x), right = load<In>(x + kLane);
#pragma GCC unroll 4
    for (int r = 0; r < kUpper; ++r) {
      const Vector<In> factor = splat(x[kLane - kUpper + r]);
      add_product(upper[r][0], factor, left);
      add_product(upper[r][1], factor, right);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) add_product(lower[r], splat(x[kLane + r]), right);
  }
  const auto add = [](T* to, const Vector<T>& v) { store<T>(to, load<T>(to) + v); };
#pragma GCC unroll 4
  for (int r = 0; r < kUpper; ++r) {
    T* to = sum + (kLane - kUpper + r) * 2 * kLane;
    add(to, upper[r][0]);
    add(to + kLane, upper[r][1]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) add(sum + (kLane + r) * 2 * kLane + kLane, lower[r]);
  }
}

// The other rows of the first vector's, by both vectors. Where `copy` is given, it becomes X, whose
// rows are there two vectors apart.
template <class T, class In>
SINGD_INLINE void add_upper(const In* x, int64_t stride, int64_t depth, In* copy, T* sum) {
  constexpr int kLane = kLanes<T>, kRows = kLane - 4;
  Vector<T> sums[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Vector<T>{};
  for (int64_t p = 0; p < depth; ++p, x += stride) {
    const Vector<In> left = load<In>(x), right = load<In>(x + kLane);
    if (copy != nullptr) {
      store<In>(copy + 2 * kLane * p, left);
      store<In>(copy + 2 * kLane * p + kLane, right);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vector<In> factor = splat(x[r]);
      add_product(sums[r][0], factor, left);
      add_product(sums[r][1], factor, right);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    T* to = sum + r * 2 * kLane;
    store<T>(to, load<T>(to) + sums[r][0]);
    store<T>(to + kLane, load<T>(to + kLane) + sums[r][1]);
  }
}

// sum += X^T X for a block that is two vectors wide.
template <class T, class In>
SINGD_INLINE void add_two_vectors(const In* x, int64_t stride, int64_t depth, int64_t size, T* sum,
                                  In* copy = nullptr) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t rows = size - kLane;
  SINGD_COUNT(multiply_adds, depth * (kLane * 2 + rows) * kLane);
  add_upper<T, In>(x, stride, depth, copy, sum);
  if (copy != nullptr) {
    x = copy;
    stride = 2 * kLane;
  }
  switch ((rows + 3) / 4) {
    case 1:
      return add_corner<T, In, 4>(x, stride, depth, rows, sum);
    case 2:
      return add_corner<T, In, 8>(x, stride, depth, rows, sum);
    case 3:
      return add_corner<T, In, 12>(x, stride, depth, rows, sum);
    default:
      return rows <= 14 ? add_corner<T, In, 14>(x, stride, depth, rows, sum)
                        : add_corner<T, In, 16>(x, stride, depth, rows, sum);
  }
}

// sum += X^T X for a block X [depth, size] of scratch: of each vector's rows the columns from that
// vector on, since the rest is symmetric. What a vector takes from columns behind the block is
// multiplied too, and not used.
template <class T, class In>
SINGD_INLINE void add_block(const In* x, int64_t stride, int64_t depth, int64_t size, T* sum) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t width = padded(size);
  if constexpr (kLane == 16) {
    if (width == 2 * kLane) return add_two_vectors(x, stride, depth, size, sum);
  }
  for (int64_t at = 0; at < size; at += kLane) {
    multiply<T, In>(smaller(kLane, size - at), width - at, depth, {x + at, 1, stride}, x + at,
                    stride, sum + at * (width + 1), width, kAdd<T>);
  }
}

// Blocks of two vectors of rows that need no conversion: multiplied where they are, and copied to
// scratch on the way, where they are multiplied again. Returns the first column of what is left.
template <class T>
int64_t add_plain_blocks(const RowsView& rows, const Layout& layout, const Panel& part, T* sums,
                         T* scratch) {
  const int64_t k = layout.block, width = padded(k), first = part.column_begin;
  const int64_t readable = (rows.features - first - width + k) / k;  // blocks, as whole vectors
  const int64_t blocks = smaller((part.column_end - first) / k, readable);
  const bool plain = rows.array.type == kScalar<T> && rows.feature_stride == 1 && !rows.reduce &&
                     rows.scale == 1 && part.row_end <= rows.shared;
  if (!plain || width != 2 * kLanes<T> || blocks <= 0) return first;
  const T* data = static_cast<const T*>(rows.array.data);
  for_each_chunk<T>(part.row_begin, part.row_end, [&](int64_t row, int64_t count) {
    const T* x = row_start(rows, data, row) + first;
    ask_for_rows(rows, row, count, first, first + blocks * k);
    SINGD_COUNT(elements, count * blocks * k);
    for (int64_t i = 0; i < blocks; ++i) {
      add_two_vectors<T, T>(x + i * k, rows.shared_stride, count, k,
                            sums + (first / k + i) * k * width, scratch);
    }
  });
  return first + blocks * k;
}
#endif

template <class T, class In>
void block_statistic(const RowsView& rows, const Layout& layout, const Panel& whole, T* sums,
                     T* scratch) {
  const int64_t k = layout.block, area = k * padded(k);
  Panel part = whole;
  if constexpr (kLanes<T> == 16 && kRowsTogether<In> == 1) {
    part.column_begin = add_plain_blocks(rows, layout, part, sums, scratch);
    if (part.column_begin >= part.column_end) return;
  }
  In* x = as<In>(scratch);
  for_each_chunk<In>(part.row_begin, part.row_end, [&](int64_t first, int64_t count) {
    for_each_panel(part, k, [&](int64_t begin, int64_t end) {
      const int64_t stride = spaced(end - begin);
      const int64_t last = smaller(begin + padded(end - begin), layout.dim);
      bring_rows(rows, first, count, begin, last, x, stride, stride);
      fill_tiles(x, depth_of<In>(count), stride);
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
  if (b == 1 && rows.feature_stride == 1 && !rows.reduce) {
    return one_border_statistic(rows, layout, given, part, sums, scratch);
  }
  In *e = as<In>(scratch), *x = as<In>(scratch + kChunkDepth * thin);
  for_each_chunk<In>(part.row_begin, part.row_end, [&](int64_t first, int64_t count) {
    const int64_t depth = depth_of<In>(count);
    // Of blocks this was slower.
    ask_for_rows(rows, first, count, part.column_begin, part.column_end);
    if (given == nullptr) {
      bring_border(rows, layout, first, count, e);
      turn_border(e, depth, thin);
    }
    const In* left = given == nullptr ? e : as<In>(given + first * thin);
    for_each_panel(part, 1, [&](int64_t begin, int64_t end) {
      const int64_t width = padded(end - begin), stride = spaced(end - begin);
      bring_rows(rows, first, count, begin, end, x, stride, width);
      fill_tiles(x, depth, stride);
      add_border(b, width, depth, left, thin, x, stride, sums + begin, wide);
      add_squares<T, In>(x, depth, stride, width, sums + b * wide + begin);
    });
  });
}

#if SINGD_BFLOAT16_PRODUCTS
// Rows [begin, end) of X^T X, of padded(dim - begin) numbers each, those from the diagonal on.
inline void gram_rows(const RowsView& rows, int64_t dim, int64_t begin, int64_t end, float* sums,
                      float* scratch) {
  const int64_t width = padded(dim - begin), stride = spaced(dim - begin);
  auto* x = as<Pair>(scratch);
  for_each_chunk<Pair>(0, rows.count, [&](int64_t first, int64_t count) {
    const int64_t depth = depth_of<Pair>(count);
    bring_rows(rows, first, count, begin, dim, x, stride, stride);
    fill_tiles(x, depth, stride);
    for (int64_t at = 0; at < end - begin; at += kGramRows) {
      add_gram_rows(x, stride, depth, at, smaller(kGramRows, end - begin - at), width, sums);
    }
  });
}
#endif

template <class T, class In>
constexpr GramKernels<T> gram_kernels() {
  return {block_statistic<T, In>, border_statistic<T, In>};
}
