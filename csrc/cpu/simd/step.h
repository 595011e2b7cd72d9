// The step of a panel of W: its gradient is brought into scratch, multiplied by C C^T from the left
// and K K^T from the right, and written (write.h) in the same visit.

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

// P[B, :] G of the panel's rows, in squares that stay in the first cache.
template <class T>
double thin_products_of_many(const StepLayer<T>& layer, const Panel& panel, T* products,
                             T* scratch) {
  const LocalProduct<T>& left = layer.left;
  const int64_t wide = padded(layer.rows), stride = padded(layer.columns);
  auto most = magnitude_bits(T(0));
  for (int64_t begin = panel.row_begin; begin < panel.row_end; begin += kThinRows) {
    const int64_t end = smaller(begin + kThinRows, panel.row_end);
    for (int64_t column = 0; column < layer.columns; column += kThinColumns) {
      const Panel square{begin, end, column, smaller(column + kThinColumns, layer.columns)};
      load_gradient<T>(layer, square, nullptr, nullptr, scratch, square.stride());
      most = larger(most, largest_bits(scratch, square.scratch()));
      multiply<T>(left.border(), padded(square.column_end - column), end - begin,
                  {left.wide + begin, wide, 1}, scratch, square.stride(), products + column, stride,
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
      for (int64_t i = panel.row_begin; i < panel.row_end; ++i) {
        const auto* row = gradient + i * part.gradient_stride + first;
        const T weight = layer.left.wide[i];
        SINGD_COUNT(multiply_adds, count);
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          const T x = unscale * static_cast<T>(widen(row[j]));
          most = larger(most, magnitude_bits(x));
          sum[j] += weight * x;
        }
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
const T* border_coefficients(const StepLayer<T>& layer) {
  return layer.left.kind == LocalKind::kRowBorder ? layer.border_rows : layer.border_products;
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

// x <- C C^T G for the panel; x holds the gradient, its rows already scaled by a diagonal. Returns
// the array that has the result.
template <class T>
T* multiply_left(const StepLayer<T>& layer, const Panel& panel, T* x, T* other) {
  const LocalProduct<T>& left = layer.left;
  const int64_t stride = panel.stride(), width = padded(panel.column_end - panel.column_begin);
  if (left.kind == LocalKind::kBlocks) {
    for_each_block(left.layout, [&](int64_t begin, int64_t size, int64_t, int64_t at) {
      if (begin < panel.row_begin || begin >= panel.row_end) return;
      const int64_t row = (begin - panel.row_begin) * stride;
      multiply<T>(size, width, size, {left.blocks + at, padded(size), 1}, x + row, stride,
                  other + row, stride, kOverwrite<T>);
    });
    return other;
  }
  if (!left.has_border()) return x;
  const int64_t rows = panel.row_end - panel.row_begin, b = left.border();
  const int64_t all = padded(layer.columns), thin = padded(b);
  if (b > 1) {  // a border of one row was added as the gradient was loaded
    multiply<T>(rows, width, b, {left.thin + panel.row_begin * thin, thin, 1},
                border_coefficients(layer) + panel.column_begin, all, x, stride, kAdd<T>);
  }
  for_each_arrow_row(layer, panel.row_begin, panel.row_end, [&](int64_t i, int64_t r) {
    __builtin_memcpy(x + (i - panel.row_begin) * stride,
                     layer.border_products + r * all + panel.column_begin,
                     static_cast<std::size_t>(width) * sizeof(T));
  });
  return x;
}

// Blocks are written a whole number of vectors wide, over the beginning of the next block, which
// is written after it; the stride leaves room behind the last.
template <class T>
T* multiply_right_blocks(const StepLayer<T>& layer, const Panel& panel, T* x, T* other) {
  const int64_t stride = panel.stride(), rows = panel.row_end - panel.row_begin;
  for_each_block(layer.right.layout, [&](int64_t begin, int64_t size, int64_t, int64_t at) {
    if (begin < panel.column_begin || begin >= panel.column_end) return;
    const int64_t column = begin - panel.column_begin;
    multiply<T>(rows, padded(size), size, {x + column, stride, 1}, layer.right.blocks + at,
                padded(size), other + column, stride, kOverwrite<T>);
  });
  return other;
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
  const int64_t d = layer.columns, b = right.border(), thin = padded(b), wide = padded(d);
  const int64_t stride = panel.stride(), rows = panel.row_end - panel.row_begin;
  const int64_t head = right.layout.head, tail = d - right.layout.tail;
  const bool arrow = right.kind == LocalKind::kRowBorder;
  T *products = scratch, *coefficients = scratch + rows * thin;
  if (b <= kFewColumns) {
    multiply_few<T>(rows, b, d, x, stride, right.wide, wide, products, thin);
  } else {
    multiply<T>(rows, thin, d, {x, stride, 1}, right.thin, thin, products, thin, kOverwrite<T>);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t r = 0; arrow && r < b; ++r) {
      coefficients[i * thin + r] = x[i * stride + (r < head ? r : r + d - b)];
    }
  }
  multiply<T>(rows, wide, b, {arrow ? coefficients : products, thin, 1}, right.wide, wide, x,
              stride, {true, right.diagonal});
  for (int64_t i = 0; arrow && i < rows; ++i) {
    for (int64_t r = 0; r < b; ++r) {
      x[i * stride + (r < head ? r : r + tail - head)] = products[i * thin + r];
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

template <class T>
bool step_panel(const StepLayer<T>& layer, const Panel& panel, bool check_only, T* scratch) {
  if (!check_only && is_pointwise(layer)) {
    write_pointwise(layer, panel);
    if (layer.options.stream) end_streams();
    return true;
  }
  T *x = scratch, *other = scratch + panel.scratch();
  load_scaled(layer, panel, x);
  T* result = multiply_left(layer, panel, x, other);
  other = result == x ? other : x;
  const T* column_scale = nullptr;
  if (layer.right.kind == LocalKind::kBlocks) {
    result = multiply_right_blocks(layer, panel, result, other);
  } else if (layer.right.has_border()) {
    multiply_right_border(layer, panel, result, scratch + 2 * panel.scratch());
  } else {
    column_scale = layer.right.diagonal;
  }
  if (check_only) return panel_is_finite(panel, result, column_scale);
  write_panel(layer, panel, result, column_scale);
  if (layer.options.stream) end_streams();
  return true;
}

template <class T>
void load_unscaled(const StepLayer<T>& layer, const Panel& panel, T* to, int64_t stride) {
  load_gradient<T>(layer, panel, nullptr, nullptr, to, stride);
}

template <class T>
constexpr StepKernels<T> step_kernels() {
  return {prepare_product<T>, load_unscaled<T>, largest_gradient<T>,
          thin_products<T>,   add_products<T>,  step_panel<T>};
}
