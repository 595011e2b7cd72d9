// The step of a panel of W: its gradient is brought into scratch, multiplied by C C^T from the left
// and K K^T from the right, and written (write.h) in the same visit.

// C <- A B and what becomes of the old C, with a matrix of P as A, its terms from number `first`
// on, or as B. On tiles C has room for whole ones, and `exact` bfloat16 numbers in B cost less.
template <class T>
void multiply_from_left(int64_t rows, int64_t columns, int64_t depth, const T* p, int64_t p_stride,
                        int64_t first, const T* b, int64_t b_stride, [[maybe_unused]] bool exact,
                        T* c, int64_t c_stride, Before<T> before) {
#if SINGD_TILES
  const Planes planes = left_planes(p, p_stride).from(first / 2);
  multiply_tiles_from_left(rows, columns, depth, planes, b, b_stride, exact, c, c_stride, before);
#else
  multiply<T>(rows, columns, depth, {p + first, p_stride, 1}, b, b_stride, c, c_stride, before);
#endif
}
template <class T>
void multiply_from_right(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride,
                         const T* p, int64_t p_stride, T* c, int64_t c_stride, Before<T> before) {
#if SINGD_TILES
  multiply_tiles_from_right(rows, columns, depth, a, a_stride, right_planes(p, p_stride), c,
                            c_stride, before);
#else
  multiply<T>(rows, columns, depth, {a, a_stride, 1}, p, p_stride, c, c_stride, before);
#endif
}

// One row that all rows of a panel take a multiple of: row i has factors[i stride] of it.
template <class T>
struct SharedRow {
  const T *row, *factors;
  int64_t stride;
};

// Rows of unscale G, `stride` apart with zeros between; where given, row i is multiplied by
// row_scale[i], and then the shared row is added.
template <class T>
void load_gradient(const StepLayer<T>& layer, const Panel& panel, const T* row_scale,
                   const SharedRow<T>* shared, T* to, int64_t stride) {
  const int64_t rows = panel.row_end - panel.row_begin;
  const T unscale = static_cast<T>(layer.options.unscale);
  for_each_piece(layer, panel, [&](const StepPart& part, int64_t at, int64_t first, int64_t count) {
    with_type(part.gradient, [&](const auto* gradient) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = panel.row_begin + i;
        const T scale = row_scale != nullptr ? unscale * row_scale[row] : unscale;
        const auto* from = gradient + row * part.gradient_stride + first;
        T* x = to + i * stride + at;
        if (shared == nullptr) {
          load_row(from, count, scale, x);
        } else {
          const T factor = shared->factors[row * shared->stride];
          SINGD_COUNT(multiply_adds, count);
          load_row_beside(from, count, scale, factor, shared->row + at, x);
        }
      }
    });
  });
  const int64_t columns = panel.column_end - panel.column_begin;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = columns; j < stride; ++j) to[i * stride + j] = T(0);
  }
}

template <class T>
double largest_gradient(const StepLayer<T>& layer, const Panel& panel) {
  auto most = magnitude_bits(T(0));
  for_each_piece(layer, panel, [&](const StepPart& part, int64_t, int64_t first, int64_t count) {
    with_type(part.gradient, [&](const auto* gradient) {
      // Rows without gaps are one long row: the lanes of a vector are compared at its end.
      const bool gaps = part.gradient_stride != count;
      const int64_t all = panel.row_end - panel.row_begin;
      const int64_t rows = gaps ? all : 1, columns = gaps ? count : all * count;
      for (int64_t i = 0; i < rows; ++i) {
        const auto* row = gradient + (panel.row_begin + i) * part.gradient_stride + first;
        for (int64_t j = 0; j < columns; ++j) {
          most = larger(most, magnitude_bits(static_cast<T>(widen(row[j]))));
        }
      }
    });
  });
  const double unscale = layer.options.unscale;
  if (most >= kInfinityBits<T>) return __builtin_inf();
  return static_cast<double>(magnitude_of(most)) * (unscale < 0 ? -unscale : unscale);
}

// f(row, its number in the border) for rows of the panel that are in an arrowhead's border.
template <class T, class Function>
SINGD_INLINE void for_each_arrow_row(const StepLayer<T>& layer, int64_t begin, int64_t end,
                                     Function f) {
  const Layout& layout = layer.left.layout;
  if (layer.left.kind != LocalKind::kRowBorder) return;
  const int64_t tail = layer.rows - layout.tail;
  for (int64_t i = begin; i < smaller(end, layout.head); ++i) f(i, i);
  for (int64_t i = larger(begin, tail); i < end; ++i) f(i, layout.head + i - tail);
}

// Asks for a panel of G, along its rows and from four places at a time.
template <class T>
void ask_for_gradient(const StepLayer<T>& layer, const Panel& panel) {
  constexpr int64_t kStreams = 4;
  const int64_t rows = panel.row_end - panel.row_begin, each = (rows + kStreams - 1) / kStreams;
  for_each_place(layer, panel, [&](const StepPart& part, int64_t, int64_t first, int64_t count) {
    with_type(part.gradient, [&](const auto* gradient) {
      const int64_t bytes = count * static_cast<int64_t>(sizeof(*gradient));
      for (int64_t r = 0; r < each; ++r) {
        const char* line[kStreams];
        for (int64_t s = 0; s < kStreams; ++s) {
          const int64_t row = panel.row_begin + smaller(r + s * each, rows - 1);
          line[s] = reinterpret_cast<const char*>(gradient + row * part.gradient_stride + first);
        }
        for (int64_t at = 0; at < bytes; at += kLineBytes) {
          for (const char* from : line) __builtin_prefetch(from + at, 0, 2);
        }
      }
    });
  });
}

// P[B, :] G of the panel's rows, in squares that stay in the first cache.
template <class T>
double thin_products_of_many(const StepLayer<T>& layer, const Panel& panel, T* products,
                             T* scratch) {
  const LocalProduct<T>& left = layer.left;
  const int64_t wide = left.stride_of(layer.rows), stride = padded(layer.columns);
  auto most = magnitude_bits(T(0));
  for (int64_t begin = panel.row_begin; begin < panel.row_end; begin += kThinRows) {
    const int64_t end = smaller(begin + kThinRows, panel.row_end);
    ask_for_gradient(layer, {begin, end, 0, layer.columns});
    for (int64_t column = 0; column < layer.columns; column += kThinColumns) {
      const Panel square{begin, end, column, smaller(column + kThinColumns, layer.columns)};
      load_gradient<T>(layer, square, nullptr, nullptr, scratch, square.stride());
      most = larger(most, largest_bits(scratch, square.scratch()));
      multiply_from_left(left.border(), padded(square.column_end - column), end - begin, left.wide,
                         wide, begin, scratch, square.stride(), layer.options.unscale == 1,
                         products + column, stride,
                         begin > panel.row_begin ? kAdd<T> : kOverwrite<T>);
      for_each_arrow_row(layer, begin, end, [&](int64_t i, int64_t r) {
        __builtin_memcpy(layer.border_rows + r * stride + column,
                         scratch + (i - begin) * square.stride(),
                         static_cast<std::size_t>(padded(square.column_end - column)) * sizeof(T));
      });
    }
  }
  return most >= kInfinityBits<T> ? __builtin_inf() : static_cast<double>(magnitude_of(most));
}

// The same for a border of one row: a weighted sum of rows, taken from where they are.
template <class T>
double thin_products_of_one(const StepLayer<T>& layer, const Panel& panel, T* sums) {
  const T unscale = static_cast<T>(layer.options.unscale);
  auto most = magnitude_bits(T(0));
  for (int64_t j = 0; j < padded(layer.columns); ++j) sums[j] = T(0);
  for_each_piece(layer, panel, [&](const StepPart& part, int64_t at, int64_t first, int64_t count) {
    with_type(part.gradient, [&](const auto* gradient) {
      T* sum = sums + at;
      const T* weights = layer.left.wide;
      const auto row_at = [&](int64_t i) { return gradient + i * part.gradient_stride + first; };
      SINGD_COUNT(multiply_adds, (panel.row_end - panel.row_begin) * count);
      // Four rows at a time, from four places, as rows of a statistic are read.
      const int64_t quarter = (panel.row_end - panel.row_begin) / 4;
      const auto number = [&](auto stored) {
        const T x = unscale * static_cast<T>(widen(stored));
        most = larger(most, magnitude_bits(x));
        return x;
      };
      for (int64_t i = panel.row_begin; i < panel.row_begin + quarter; ++i) {
        const auto *a = row_at(i), *b = row_at(quarter + i);
        const auto *c = row_at(2 * quarter + i), *d = row_at(3 * quarter + i);
        const T w[] = {weights[i], weights[quarter + i], weights[2 * quarter + i],
                       weights[3 * quarter + i]};
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          sum[j] += (w[0] * number(a[j]) + w[1] * number(b[j])) +
                    (w[2] * number(c[j]) + w[3] * number(d[j]));
        }
      }
      for (int64_t i = panel.row_begin + 4 * quarter; i < panel.row_end; ++i) {
        const auto* row = row_at(i);
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) sum[j] += weights[i] * number(row[j]);
      }
    });
  });
  for_each_arrow_row(layer, panel.row_begin, panel.row_end, [&](int64_t i, int64_t) {
    load_gradient<T>(layer, {i, i + 1, 0, layer.columns}, nullptr, nullptr, layer.border_rows,
                     padded(layer.columns));
  });
  return most >= kInfinityBits<T> ? __builtin_inf() : static_cast<double>(magnitude_of(most));
}

template <class T>
double thin_products(const StepLayer<T>& layer, const Panel& panel, T* products, T* scratch) {
  return layer.left.border() == 1 ? thin_products_of_one(layer, panel, products)
                                  : thin_products_of_many(layer, panel, products, scratch);
}

template <class T>
void add_products(const StepLayer<T>& layer, const T* products) {
  const int64_t count = layer.left.border() * padded(layer.columns);
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) layer.border_products[j] += products[j];
}

// The rows of G, or of P[B, :] G, that a border on the left spreads over all rows.
template <class T>
T* border_coefficients(const StepLayer<T>& layer) {
  return layer.left.kind == LocalKind::kRowBorder ? layer.border_rows : layer.border_products;
}

// These rows as tiles take them: once a layer, since all panels have a share of them.
template <class T>
void finish_border([[maybe_unused]] const StepLayer<T>& layer) {
#if SINGD_TILES
  const int64_t b = layer.left.border(), stride = padded(layer.columns);
  if (layer.left.form == Form::kNumbers) return;
  zero_behind(layer.left, border_coefficients(layer), b, stride);
  split_right(border_coefficients(layer), layer.left.rows_of(b), stride);
#endif
}

// x <- x + P[:, B] times these rows, for the columns of a panel; x has room for whole tiles.
template <class T>
void add_border_rows(const StepLayer<T>& layer, const Panel& panel, T* x) {
  const LocalProduct<T>& left = layer.left;
  const int64_t stride = panel.stride(), width = padded(panel.column_end - panel.column_begin);
  const int64_t rows = panel.row_end - panel.row_begin, b = left.border();
  const int64_t all = padded(layer.columns), thin = left.stride_of(b);
  const T *by = left.thin + panel.row_begin * thin, *spread = border_coefficients(layer);
#if SINGD_TILES
  SINGD_COUNT(multiply_adds, rows * width * b);
  Planes right = right_planes(spread, all).from(panel.column_begin);
  // Rows of a bfloat16 gradient have no low plane.
  if (left.kind == LocalKind::kRowBorder && layer.options.unscale == 1) right.low = nullptr;
  for (int64_t i = 0; i < rows; i += kSide) {
    for (int64_t j = 0; j < width; j += kSide) {
      const Planes columns{right.high + j, right.low == nullptr ? nullptr : right.low + j,
                           right.stride};
      multiply_square(rows - i, width - j, thin / kTileDepth, left_planes(by + i * thin, thin),
                      columns, x + i * stride + j, stride, true);
    }
  }
#else
  multiply<T>(rows, width, b, {by, thin, 1}, spread + panel.column_begin, all, x, stride, kAdd<T>);
#endif
}

// Brings the gradient of a panel, which is all there is to a diagonal on the left.
template <class T>
void load_scaled(const StepLayer<T>& layer, const Panel& panel, T* x) {
  const LocalProduct<T>& left = layer.left;
  const bool one = left.has_border() && left.border() == 1;
  const SharedRow<T> shared{one ? border_coefficients(layer) + panel.column_begin : nullptr,
                            left.thin, padded(1)};
  load_gradient<T>(layer, panel, left.diagonal, one ? &shared : nullptr, x, panel.stride());
}

// A border on the left: x <- C C^T G for the panel, whose rows x has, already scaled by the
// diagonal.
template <class T>
void multiply_left_border(const StepLayer<T>& layer, const Panel& panel, T* x) {
  const int64_t stride = panel.stride(), width = padded(panel.column_end - panel.column_begin);
  const int64_t all = padded(layer.columns);
  // A border of one row was added as the gradient was loaded.
  if (layer.left.border() > 1) add_border_rows(layer, panel, x);
  for_each_arrow_row(layer, panel.row_begin, panel.row_end, [&](int64_t i, int64_t r) {
    __builtin_memcpy(x + (i - panel.row_begin) * stride,
                     layer.border_products + r * all + panel.column_begin,
                     static_cast<std::size_t>(width) * sizeof(T));
  });
}

// Blocks on the left: to <- C C^T x for the panel's rows.
template <class T>
void multiply_left_blocks(const StepLayer<T>& layer, const Panel& panel, const T* x, T* to,
                          int64_t to_stride) {
  const LocalProduct<T>& left = layer.left;
  const int64_t stride = panel.stride(), width = padded(panel.column_end - panel.column_begin);
  for_each_block(left, [&](int64_t begin, int64_t size, int64_t, int64_t at) {
    if (begin < panel.row_begin || begin >= panel.row_end) return;
    const int64_t row = begin - panel.row_begin;
    multiply_from_left(size, width, size, left.blocks + at, left.stride_of(size), 0,
                       x + row * stride, stride, layer.options.unscale == 1, to + row * to_stride,
                       to_stride, kOverwrite<T>);
  });
}

// Blocks are written a whole number of vectors wide, over the beginning of the next block, which
// is written after it; the stride leaves room behind the last.
template <class T>
void multiply_right_blocks(const StepLayer<T>& layer, const Panel& panel, const T* x, T* to,
                           int64_t to_stride) {
  const int64_t stride = panel.stride(), rows = panel.row_end - panel.row_begin;
  const LocalProduct<T>& right = layer.right;
  for_each_block(right, [&](int64_t begin, int64_t size, int64_t, int64_t at) {
    if (begin < panel.column_begin || begin >= panel.column_end) return;
    const int64_t column = begin - panel.column_begin;
    multiply_from_right(rows, padded(size), size, x + column, stride, right.blocks + at,
                        right.stride_of(size), to + column, to_stride, kOverwrite<T>);
  });
}

// Columns of a border up to which dot products are faster than whole vectors of padded columns.
constexpr int64_t kFewColumns = 8;

// A border of one row or column: a dot product of every row, and a multiple of one row added.
template <class T>
void multiply_right_one(const StepLayer<T>& layer, const Panel& panel, T* x) {
  const LocalProduct<T>& right = layer.right;
  const int64_t width = padded(layer.columns);
  const int64_t at = right.layout.head == 1 ? 0 : layer.columns - 1;
  const bool arrow = right.kind == LocalKind::kRowBorder;
  SINGD_COUNT(multiply_adds, 2 * (panel.row_end - panel.row_begin) * width);
  for (int64_t i = panel.row_begin; i < panel.row_end; ++i, x += panel.stride()) {
    const T product = dot_product(x, right.wide, width);
    const T factor = arrow ? x[at] : product;
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) x[j] = right.diagonal[j] * x[j] + factor * right.wide[j];
    if (arrow) x[at] = product;
  }
}

template <class T>
void multiply_right_border(const StepLayer<T>& layer, const Panel& panel, T* x, T* scratch) {
  const LocalProduct<T>& right = layer.right;
  if (right.border() == 1) return multiply_right_one(layer, panel, x);
  const int64_t d = layer.columns, b = right.border(), thin = right.stride_of(b);
  const int64_t width = padded(b), wide = right.stride_of(d), all = padded(d);
  const int64_t stride = panel.stride(), rows = panel.row_end - panel.row_begin;
  const int64_t head = right.layout.head, tail = d - right.layout.tail;
  const bool arrow = right.kind == LocalKind::kRowBorder;
  T *products = scratch, *coefficients = scratch + scratch_rows(layer, panel) * width;
  if (b <= kFewColumns) {
    multiply_few<T>(rows, b, d, x, stride, right.wide, wide, products, width);
  } else {
    multiply_from_right(rows, width, d, x, stride, right.thin, thin, products, width,
                        kOverwrite<T>);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t r = 0; arrow && r < b; ++r) {
      coefficients[i * width + r] = x[i * stride + (r < head ? r : r + d - b)];
    }
  }
  multiply_from_right(rows, all, b, arrow ? coefficients : products, width, right.wide, wide, x,
                      stride, {true, right.diagonal});
  for (int64_t i = 0; arrow && i < rows; ++i) {
    for (int64_t r = 0; r < b; ++r) {
      x[i * stride + (r < head ? r : r + tail - head)] = products[i * width + r];
    }
  }
}

// Whether x times the column scale is finite over the panel.
template <class T>
bool panel_is_finite(const Panel& panel, const T* x, const T* column_scale) {
  const int64_t columns = panel.column_end - panel.column_begin;
  auto most = magnitude_bits(T(0));
  for (int64_t i = 0; i < panel.row_end - panel.row_begin; ++i) {
    const T* row = x + i * panel.stride();
    for (int64_t j = 0; j < columns; ++j) {
      const T scale = column_scale != nullptr ? column_scale[panel.column_begin + j] : T(1);
      most = larger(most, magnitude_bits(row[j] * scale));
    }
  }
  return most < kInfinityBits<T>;
}

// C C^T G of a panel, times K K^T where that has blocks, to `to`: in pieces that stay in the near
// caches between these products. scratch: 2 * piece_scratch.
template <class T>
void precondition_blocks(const StepLayer<T>& layer, const Panel& panel, T* to, T* scratch) {
  if (precondition_squares(layer, panel, to)) return;
  const bool left = layer.left.kind == LocalKind::kBlocks;
  const bool right = layer.right.kind == LocalKind::kBlocks;
  const int64_t width = piece_columns(layer);
  for (int64_t begin = panel.column_begin; begin < panel.column_end; begin += width) {
    Panel piece = panel;
    piece.column_begin = begin;
    piece.column_end = smaller(begin + width, panel.column_end);
    T *x = scratch, *other = scratch + piece_scratch(layer, panel);
    T* result = to + begin - panel.column_begin;
    load_scaled(layer, piece, x);
    if (layer.left.has_border()) multiply_left_border(layer, piece, x);
    if (left && right) {
      multiply_left_blocks(layer, piece, x, other, piece.stride());
      multiply_right_blocks(layer, piece, other, result, panel.stride());
    } else if (left) {
      multiply_left_blocks(layer, piece, x, result, panel.stride());
    } else {
      multiply_right_blocks(layer, piece, x, result, panel.stride());
    }
  }
}

template <class T>
bool step_panel(const StepLayer<T>& layer, const Panel& panel, bool check_only, T* scratch) {
  if (!check_only && is_pointwise(layer)) {
    write_pointwise(layer, panel);
    if (layer.options.stream) end_streams();
    return true;
  }
  T *x = scratch, *more = scratch + panel_scratch(layer, panel);
  if (has_blocks(layer)) {
    precondition_blocks(layer, panel, x, more);
  } else {
    load_scaled(layer, panel, x);
    if (layer.left.has_border()) multiply_left_border(layer, panel, x);
  }
  if (layer.right.has_border()) multiply_right_border(layer, panel, x, more);
  const T* column_scale = layer.right.has_border() ? nullptr : layer.right.diagonal;
  if (check_only) return panel_is_finite(panel, x, column_scale);
  write_panel(layer, panel, x, column_scale);
  if (layer.options.stream) end_streams();
  return true;
}

template <class T>
void load_unscaled(const StepLayer<T>& layer, const Panel& panel, T* to, int64_t stride) {
  load_gradient<T>(layer, panel, nullptr, nullptr, to, stride);
}

template <class T>
constexpr StepKernels<T> step_kernels() {
  return {prepare_product<T>, load_unscaled<T>, largest_gradient<T>, thin_products<T>,
          add_products<T>,    finish_border<T>, step_panel<T>};
}
