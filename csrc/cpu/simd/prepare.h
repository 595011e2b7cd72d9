// P = F F^T of a diagonal, block-diagonal or bordered factor, laid out for products with it.

// The larger one, or the one that is NaN: a norm must not hide it.
template <class T>
SINGD_INLINE T larger_or_nan(T a, T b) {
  return b <= a || a != a ? a : b;
}

// The largest sum of |entries| of a row, or of a column; rows end in zeros up to a whole vector.
template <class T>
T largest_row_sum(const T* matrix, int64_t rows, int64_t columns, int64_t stride) {
  T most = 0;
  for (int64_t i = 0; i < rows; ++i) {
    Vector<T> sums = {};
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      sums += magnitudes<T>(load<T>(matrix + i * stride + j));
    }
    most = larger_or_nan(most, lane_sum<T>(sums));
  }
  return most;
}

template <class T>
T largest_column_sum(const T* matrix, int64_t rows, int64_t columns, int64_t stride) {
  Vector<T> most = {};
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    Vector<T> sums = {};
    for (int64_t i = 0; i < rows; ++i) {
      sums += magnitudes<T>(load<T>(matrix + i * stride + j));
    }
    most = ((sums <= most) | (most != most)) ? most : sums;
  }
  T all = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) all = larger_or_nan(all, most[lane]);
  return all;
}

template <class T>
void fill_zeros(T* to, int64_t count) {
  __builtin_memset(to, 0, static_cast<std::size_t>(count) * sizeof(T));
}

template <class T>
void prepare_diagonal(LocalProduct<T>& product, const T* factor) {
  const int64_t d = product.layout.dim;
  for (int64_t j = 0; j < d; ++j) product.diagonal[j] = factor[j] * factor[j];
  if (product.taps > 1) {  // all columns but that of a bias are in channels-last order
    const int64_t channels = d / product.taps;
    for (int64_t j = 0; j < channels * product.taps; ++j) {
      const T x = factor[j];
      product.diagonal[j % product.taps * channels + j / product.taps] = x * x;
    }
  }
  product.norm = static_cast<double>(magnitude_of(largest_bits(product.diagonal, d)));
}

// f(first row, rows, offset in the factor's storage, offset in memory where a block of so many rows
// takes area(rows)) for every block.
template <class Area, class Function>
SINGD_INLINE void for_each_block(const Layout& layout, Area area, Function f) {
  const int64_t k = layout.block;
  int64_t from = 0, to = 0;
  for (int64_t begin = 0; begin < layout.dim; begin += k) {
    const int64_t size = smaller(k, layout.dim - begin);
    f(begin, size, from, to);
    from += size * size;
    to += area(size);
  }
}
// With rows that are padded to whole vectors, or as product.blocks has them.
template <class Function>
SINGD_INLINE void for_each_block(const Layout& layout, Function f) {
  for_each_block(layout, [](int64_t size) { return size * padded(size); }, f);
}
template <class T, class Function>
SINGD_INLINE void for_each_block(const LocalProduct<T>& product, Function f) {
  const auto area = [&](int64_t size) { return product.rows_of(size) * product.stride_of(size); };
  for_each_block(product.layout, area, f);
}

// Zeros where the planes of a matrix have more rows than P: what is there is multiplied by zeros.
template <class T>
void zero_behind(const LocalProduct<T>& product, T* matrix, int64_t rows, int64_t stride) {
  fill_zeros(matrix + rows * stride, (product.rows_of(rows) - rows) * stride);
}

// A matrix of P in the form that products take it in.
#if SINGD_TILES
SINGD_INLINE void bring_into_form(const LocalProduct<float>& product, float* matrix, int64_t rows,
                                  int64_t stride, float* scratch) {
  if (product.form == Form::kLeftPlanes) split_left(matrix, product.rows_of(rows), stride, scratch);
  if (product.form == Form::kRightPlanes) split_right(matrix, product.rows_of(rows), stride);
}
#else
template <class T>
SINGD_INLINE void bring_into_form(const LocalProduct<T>&, T*, int64_t, int64_t, T*) {}
#endif

template <class T>
void prepare_blocks(LocalProduct<T>& product, const T* factor, T* scratch) {
  T most = 0;
  for_each_block(product, [&](int64_t, int64_t size, int64_t from, int64_t to) {
    const int64_t stride = product.stride_of(size);
    T* square = product.blocks + to;
    transpose_padded(factor + from, size, size, size, scratch, stride);
    multiply<T>(size, stride, size, {factor + from, size, 1}, scratch, stride, square, stride,
                kOverwrite<T>);
    zero_behind(product, square, size, stride);
    most = larger_or_nan(most, largest_column_sum(square, size, size, stride));  // symmetric
    bring_into_form(product, square, size, stride, scratch);
  });
  product.norm = static_cast<double>(most);
}

// The stored R = [E; D] has the dense rows E = R[B, :] and the diagonal D on the interior. With a
// column border F = R^T and P = E^T E + D^2: the thin matrix is E^T. With a row border F = R,
// P[B, B] = E E^T and P[B, j] = E[:, j] D_j: the thin matrix is E^T first, for that product.
template <class T>
void prepare_border(LocalProduct<T>& product, const T* factor, T* scratch) {
  const Layout& layout = product.layout;
  const int64_t d = layout.dim, b = product.border(), tail = d - layout.tail;
  const int64_t wide = product.wide_stride(), thin = product.stride_of(b);
  const T* interior = factor + b * d - layout.head;  // D of index j is interior[j]
  fill_zeros(product.diagonal, layout.head);
  for (int64_t j = layout.head; j < tail; ++j) product.diagonal[j] = interior[j] * interior[j];
  fill_zeros(product.diagonal + tail, padded(d) - tail);
  transpose_padded(factor, b, d, d, product.thin, thin);
  const bool arrow = product.kind == LocalKind::kRowBorder;
  T* core = scratch;
  if (arrow) {
    multiply<T>(b, thin, d, {factor, d, 1}, product.thin, thin, core, thin, kOverwrite<T>);
    for (int64_t j = layout.head; j < tail; ++j) {
      copy_scaled(product.thin + j * thin, thin, interior[j], product.thin + j * thin);
    }
  }
  for (int64_t r = 0; r < b; ++r) {
    const T* e = factor + r * d;
    T* row = product.wide + r * wide;
    fill_zeros(row + d, wide - d);
    if (!arrow) {
      copy_scaled(e, d, T(1), row);
      continue;
    }
    const T* square = core + r * thin;
    for (int64_t j = 0; j < layout.head; ++j) row[j] = square[j];
#pragma GCC ivdep
    for (int64_t j = layout.head; j < tail; ++j) row[j] = e[j] * interior[j];
    for (int64_t j = tail; j < d; ++j) row[j] = square[j - (d - b)];
    const int64_t at = r < layout.head ? r : r + d - b;
    copy_scaled(square, thin, T(1), product.thin + at * thin);
  }
  zero_behind(product, product.wide, b, wide);
  zero_behind(product, product.thin, d, thin);
}

// |x| summed along the way of a multiplication: by the border, then by the rest.
template <class T>
double border_norm(const LocalProduct<T>& product) {
  const int64_t d = product.layout.dim, b = product.border();
  const int64_t stride = product.wide_stride();
  const double across = static_cast<double>(largest_row_sum(product.wide, b, d, stride));
  const auto diagonal = static_cast<double>(magnitude_of(largest_bits(product.diagonal, d)));
  const double along = static_cast<double>(largest_column_sum(product.wide, b, d, stride));
  const bool twice = product.kind == LocalKind::kColumnBorder;
  return larger_or_nan(across, diagonal + along * (twice ? larger_or_nan(across, 1.0) : 1.0));
}

#if SINGD_PAIRS
// E and E^T of an arrowhead in pairs.
inline void prepare_pairs(LocalProduct<float>& product, const float* factor) {
  const Layout& layout = product.layout;
  const int64_t d = layout.dim, b = product.border(), tail = d - layout.tail;
  const int64_t wide = product.wide_stride(), thin = product.stride_of(b);
  const float* interior = factor + b * d - layout.head;  // D of index j is interior[j]
  fill_zeros(product.diagonal, padded(d));
  for (int64_t j = 0; j < d; ++j) {
    const bool inside = j >= layout.head && j < tail;
    if (inside) product.diagonal[j] = interior[j];
    product.outer[j] = inside ? interior[j] : 1.0f;
  }
  transpose_padded(factor, b, d, d, product.thin, thin);
  for (int64_t r = 0; r < b; ++r) {
    copy_scaled(factor + r * d, d, 1.0f, product.wide + r * wide);
    fill_zeros(product.wide + r * wide + d, wide - d);
  }
  // Bounds x F, x F^T and x F F^T.
  const auto across = static_cast<double>(largest_row_sum(product.wide, b, d, wide));
  const auto along = static_cast<double>(largest_column_sum(product.wide, b, d, wide));
  const auto diagonal = static_cast<double>(magnitude_of(largest_bits(product.diagonal, d)));
  product.norm =
      larger_or_nan(1.0, larger_or_nan(across, diagonal)) * larger_or_nan(1.0, along + diagonal);
  pair_rows(product.thin, d, thin);
  pair_rows(product.wide, b, wide);
}
#endif

// A norm is made of rounded sums, which the factor makes up for.
constexpr double kRounded = 1.001;

template <class T>
void prepare_product(LocalProduct<T>& product, ConstArray storage, int64_t size, T* scratch) {
  const T* factor = static_cast<const T*>(storage.data);
  if (storage.type != kScalar<T>) {
    with_type(storage, [&](const auto* numbers) { load_row(numbers, size, T(1), scratch); });
    factor = scratch;
    scratch += size;
  }
  if (product.kind == LocalKind::kDiagonal) {
    prepare_diagonal(product, factor);
  } else if (product.kind == LocalKind::kBlocks) {
    prepare_blocks(product, factor, scratch);
#if SINGD_PAIRS
  } else if (product.has_pairs()) {
    prepare_pairs(product, factor);
#endif
  } else if (product.has_border()) {
    prepare_border(product, factor, scratch);
    product.norm = border_norm(product);
    bring_into_form(product, product.wide, product.border(), product.wide_stride(), scratch);
    bring_into_form(product, product.thin, product.layout.dim, product.stride_of(product.border()),
                    scratch);
  }
  product.norm *= kRounded;
}
