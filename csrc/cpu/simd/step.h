// The step of a panel of W: its gradient is brought into scratch (read.h), multiplied by C C^T from
// the left and K K^T from the right, and written (write.h) in the same visit.

// x <- x + P[:, B] times these rows, for the columns of a panel; x has room for whole tiles. Not
// for rows in an arrowhead's border, which are known.
template <class T>
void add_border_rows(const StepLayer<T>& layer, const Panel& panel, T* x,
                     [[maybe_unused]] Ahead& ahead) {
  const LocalProduct<T>& left = layer.left;
  const int64_t stride = panel.stride(), width = padded(panel.column_end - panel.column_begin);
  const int64_t begin = larger(panel.row_begin, left.first_mixed());
  const int64_t rows = smaller(panel.row_end, left.last_mixed()) - begin, b = left.border();
  const int64_t all = spaced(layer.columns), thin = left.stride_of(b);
  const T *by = left.thin + begin * thin, *spread = border_coefficients(layer);
  if (rows <= 0) return;
  x += (begin - panel.row_begin) * stride;
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
  multiply<T>(rows, width, b, {by, thin, 1}, spread + panel.column_begin, all, x, stride, kAdd<T>,
              &ahead);
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
void multiply_left_border(const StepLayer<T>& layer, const Panel& panel, T* x, Ahead& ahead) {
  const int64_t stride = panel.stride(), width = padded(panel.column_end - panel.column_begin);
  const int64_t all = spaced(layer.columns);
  // A border of one row was added as the gradient was loaded.
  if (layer.left.border() > 1) add_border_rows(layer, panel, x, ahead);
  for_each_arrow_row(layer, panel.row_begin, panel.row_end, [&](int64_t i, int64_t r) {
    __builtin_memcpy(x + (i - panel.row_begin) * stride,
                     layer.border_products + r * all + panel.column_begin,
                     static_cast<std::size_t>(width) * sizeof(T));
  });
}

// Blocks on the left: to <- C C^T x for the panel's rows.
template <class T>
void multiply_left_blocks(const StepLayer<T>& layer, const Panel& panel, const T* x, T* to,
                          int64_t to_stride, Ahead& ahead) {
  const LocalProduct<T>& left = layer.left;
  const int64_t stride = panel.stride(), width = padded(panel.column_end - panel.column_begin);
  for_each_block(left, [&](int64_t begin, int64_t size, int64_t, int64_t at) {
    if (begin < panel.row_begin || begin >= panel.row_end) return;
    const int64_t row = begin - panel.row_begin;
    multiply_from_left(size, width, size, left.blocks + at, left.stride_of(size), 0,
                       x + row * stride, stride, layer.options.unscale == 1, to + row * to_stride,
                       to_stride, kOverwrite<T>, ahead);
  });
}

// Blocks are written a whole number of vectors wide, over the beginning of the next block, which
// is written after it; the stride leaves room behind the last.
template <class T>
void multiply_right_blocks(const StepLayer<T>& layer, const Panel& panel, const T* x, T* to,
                           int64_t to_stride, Ahead& ahead) {
  const int64_t stride = panel.stride(), rows = panel.row_end - panel.row_begin;
  const LocalProduct<T>& right = layer.right;
  for_each_block(right, [&](int64_t begin, int64_t size, int64_t, int64_t at) {
    if (begin < panel.column_begin || begin >= panel.column_end) return;
    const int64_t column = begin - panel.column_begin;
    multiply_from_right(rows, padded(size), size, x + column, stride, right.blocks + at,
                        right.stride_of(size), to + column, to_stride, kOverwrite<T>, ahead);
  });
}

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

// f(number in the border, column) for the columns of an arrowhead's border: its head, then its
// tail.
template <class T, class Function>
SINGD_INLINE void for_each_border_column(const LocalProduct<T>& p, Function f) {
  for (int64_t r = 0; r < p.layout.head; ++r) f(r, r);
  for (int64_t r = p.layout.head; r < p.border(); ++r) f(r, p.layout.dim - p.border() + r);
}

// These numbers of rows of x, and back.
template <class T>
void take_border(const LocalProduct<T>& p, int64_t rows, const T* x, int64_t stride, T* border,
                 int64_t width) {
  for (int64_t i = 0; i < rows; ++i, x += stride, border += width) {
    for_each_border_column(p, [&](int64_t r, int64_t j) { border[r] = x[j]; });
  }
}
template <class T>
void put_border(const LocalProduct<T>& p, int64_t rows, const T* border, int64_t width, T* x,
                int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, x += stride, border += width) {
    for_each_border_column(p, [&](int64_t r, int64_t j) { x[j] = border[r]; });
  }
}

#if SINGD_PAIRS
// The same for an arrowhead with F's own numbers: y = x F, of which the border is y E^T, and the
// rest y D, which comes as the panel is written. y is rounded, and not x, of which most may be gone
// in y.
template <class T>
void multiply_right_pairs(const StepLayer<T>& layer, const Panel& panel, T* x, T* scratch,
                          Ahead& ahead) {
  const LocalProduct<T>& right = layer.right;
  const int64_t d = layer.columns, b = right.border(), width = padded(b);
  const int64_t stride = panel.stride(), rows = panel.row_end - panel.row_begin;
  T *products = scratch, *border = products + rows * width;
  Pair* pairs = as<Pair>(border + rows * width);
  fill_zeros(border, rows * width);
  take_border(right, rows, x, stride, border, width);
  for (int64_t i = 0; i < rows; ++i) {
    pair_row(border + i * width, width, as<Pair>(border + i * width));
  }
  multiply<T, Pair>(rows, padded(d), (b + 1) / 2, {as<Pair>(border), width, 1},
                    as<Pair>(right.wide), right.wide_stride(), x, stride, {true, right.diagonal},
                    &ahead);
  for (int64_t j = 0; j < d; j += kPairColumns) {
    const int64_t count = smaller(kPairColumns, d - j);
    for (int64_t i = 0; i < rows; ++i) {
      pair_row(x + i * stride + j, padded(count), pairs + i * (kPairColumns / 2));
    }
    multiply<T, Pair>(rows, width, (count + 1) / 2, {pairs, kPairColumns / 2, 1},
                      as<Pair>(right.thin) + j / 2 * width, width, products, width,
                      j > 0 ? kAdd<T> : kOverwrite<T>, &ahead);
  }
  put_border(right, rows, products, width, x, stride);
}
#endif

template <class T>
void multiply_right_border(const StepLayer<T>& layer, const Panel& panel, T* x, T* scratch,
                           Ahead& ahead) {
  const LocalProduct<T>& right = layer.right;
  if (right.border() == 1) return multiply_right_one(layer, panel, x);
#if SINGD_PAIRS
  if (right.has_pairs()) return multiply_right_pairs(layer, panel, x, scratch, ahead);
#endif
  const int64_t d = layer.columns, b = right.border(), thin = right.stride_of(b);
  // Numbers in an arrowhead's border are the products that come first.
  const int64_t width = padded(b), wide = right.wide_stride(), mixed = padded(right.last_mixed());
  const int64_t stride = panel.stride(), rows = panel.row_end - panel.row_begin;
  const bool arrow = right.kind == LocalKind::kRowBorder;
  T *products = scratch, *coefficients = scratch + scratch_rows(layer, panel) * width;
  if (b <= kFewColumns) {
    multiply_few<T>(rows, b, d, x, stride, right.wide, wide, products, width);
  } else {
    multiply_from_right(rows, width, d, x, stride, right.thin, thin, products, width, kOverwrite<T>,
                        ahead);
  }
  if (arrow) take_border(right, rows, x, stride, coefficients, width);
  multiply_from_right(rows, mixed, b, arrow ? coefficients : products, width, right.wide, wide, x,
                      stride, {true, right.diagonal}, ahead);
  if (arrow) put_border(right, rows, products, width, x, stride);
}

// C C^T G of a panel, times K K^T where that has blocks, to `to`: in pieces that stay in the near
// caches between these products. scratch: 2 * piece_scratch.
template <class T>
void precondition_blocks(const StepLayer<T>& layer, const Panel& panel, T* to, T* scratch,
                         Ahead& ahead) {
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
    if (layer.left.has_border()) multiply_left_border(layer, piece, x, ahead);
    if (left && right) {
      multiply_left_blocks(layer, piece, x, other, piece.stride(), ahead);
      multiply_right_blocks(layer, piece, other, result, panel.stride(), ahead);
    } else if (left) {
      multiply_left_blocks(layer, piece, x, result, panel.stride(), ahead);
    } else {
      multiply_right_blocks(layer, piece, x, result, panel.stride(), ahead);
    }
  }
}

// W and M of a panel, for the tiles of its products.
template <class T>
Ahead ahead_of_write(const StepLayer<T>& layer, const Panel& panel) {
  const int64_t rows = panel.row_end - panel.row_begin;
  const int64_t sides = int64_t{layer.left.has_tiles()} + int64_t{layer.right.has_tiles()};
  const int64_t tiles = sides * rows * (panel.column_end - panel.column_begin) / kTileNumbers<T>;
  Ahead ahead;
  for_each_place(layer, panel, [&](const Place& place) {
    if (place.part.is_line()) return;  // a bias
    const auto ask = [&](const Array& array, AskedRows& asked) {
      if (array.data == nullptr) return;
      with_type(array, [&](const auto* data) {
        asked = asked_rows(data + place.slot(0), place.rows, place.columns, place.part.width, tiles,
                           true);
      });
    };
    ask(place.part.weight, ahead.first);
    ask(place.part.momentum, ahead.second);
  });
  return ahead;
}

template <class T>
bool step_panel(const StepLayer<T>& layer, const Panel& panel, bool check_only, T* scratch) {
  if (!check_only && is_pointwise(layer)) {
    write_pointwise(layer, panel);
    if (layer.options.stream) end_streams();
    return true;
  }
  T *x = scratch, *more = scratch + panel_scratch(layer, panel);
  Ahead ahead;
  if (layer.options.ask && !check_only) ahead = ahead_of_write(layer, panel);
  if (has_blocks(layer)) {
    precondition_blocks(layer, panel, x, more, ahead);
  } else {
    load_scaled(layer, panel, x);
    if (layer.left.has_border()) multiply_left_border(layer, panel, x, ahead);
  }
  if (layer.right.has_border()) multiply_right_border(layer, panel, x, more, ahead);
  const T* column_scale = layer.right.has_border() ? layer.right.outer : layer.right.diagonal;
  if (check_only) return panel_is_finite(layer, panel, x, column_scale);
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
