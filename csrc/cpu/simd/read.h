// What a step reads before it writes: the gradient into scratch, its largest number, and with a
// border on the left the thin products P[B, :] G.

// One row that all rows of a panel take a multiple of: row i has factors[i stride] of it.
template <class T>
struct SharedRow {
  const T *row, *factors;
  int64_t stride;
};

// Rows of unscale G, `stride` apart with zeros between; where given, row i is multiplied by
// row_scale[i], and then the shared row is added. look(numbers, count) comes first, with pieces of
// rows as they are stored.
template <class T, class Look>
SINGD_INLINE void load_gradient(const StepLayer<T>& layer, const Panel& panel, const T* row_scale,
                                const SharedRow<T>* shared, T* to, int64_t stride, Look look) {
  const T unscale = static_cast<T>(layer.options.unscale);
  for_each_piece(layer, panel, [&](const Place& place) {
    with_type(place.part.gradient, [&](const auto* gradient) {
      const int64_t count = place.columns;
      for (int64_t i = 0; i < place.rows; ++i) {
        const int64_t row = place.row + i;
        const T scale = row_scale != nullptr ? unscale * row_scale[row] : unscale;
        const auto* from = gradient + place.gradient_slot(i);
        T* x = to + (place.panel_row + i) * stride + place.at;
        if (place.part.taps > 1) {
          load_taps(place.part, from - place.first, place.first, count, scale, x, look);
          if (shared == nullptr) continue;
          load_row_beside(x, count, T(1), shared->factors[row * shared->stride],
                          shared->row + place.at, x);
          continue;
        }
        look(from, count);
        if (shared == nullptr) {
          load_row(from, count, scale, x);
        } else {
          const T factor = shared->factors[row * shared->stride];
          SINGD_COUNT(multiply_adds, count);
          load_row_beside(from, count, scale, factor, shared->row + place.at, x);
        }
      }
    });
  });
  const int64_t rows = panel.row_end - panel.row_begin;
  const int64_t columns = panel.column_end - panel.column_begin;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = columns; j < stride; ++j) to[i * stride + j] = T(0);
  }
}
template <class T>
void load_gradient(const StepLayer<T>& layer, const Panel& panel, const T* row_scale,
                   const SharedRow<T>* shared, T* to, int64_t stride) {
  load_gradient(layer, panel, row_scale, shared, to, stride, [](const auto*, int64_t) {});
}

// Bytes by which a pass over memory asks for more than it works on: two pages, since the
// prefetchers of processors stop at the end of a page, and where the next one is has to be looked
// up.
constexpr int64_t kAheadBytes = 8192;

// max |x| of numbers as they are stored: infinity or NaN, if one of them is.
template <class Stored>
SINGD_INLINE Stored largest_stored(const Stored* x, int64_t count) {
  using Bits = decltype(magnitude_bits(Stored{}));
  constexpr auto kAllButSign = static_cast<Bits>(static_cast<Bits>(~Bits(0)) >> 1);
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(Stored));
  Vector<Bits> most{};
  int64_t j = 0;
  for (; j + kLine <= count; j += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(x + j) + kAheadBytes, 0, 2);
    for (int64_t i = 0; i < kLine; i += kLanes<Bits>) {
      const Vector<Bits> bits = load(reinterpret_cast<const Bits*>(x + j + i)) & kAllButSign;
      most = most < bits ? bits : most;
    }
  }
  Bits largest = 0;
  for (int64_t i = 0; i < kLanes<Bits>; ++i) largest = larger<Bits>(largest, most[i]);
  for (; j < count; ++j) largest = larger<Bits>(largest, magnitude_bits(x[j]));
  return __builtin_bit_cast(Stored, largest);
}

// max |unscale G| over what was looked at.
template <class T>
class LargestGradient {
 public:
  template <class Stored>
  SINGD_INLINE void look(const Stored* x, int64_t count) {
    most_ = larger(most_, magnitude_bits(static_cast<T>(widen(largest_stored(x, count)))));
  }
  // Infinite if not all was finite, unscale included.
  double value(double unscale) const {
    const double value =
        static_cast<double>(magnitude_of(most_)) * (unscale < 0 ? -unscale : unscale);
    return most_ < kInfinityBits<T> && value < __builtin_inf() ? value : __builtin_inf();
  }

 private:
  decltype(magnitude_bits(T{})) most_ = 0;
};

template <class T>
double largest_gradient(const StepLayer<T>& layer, const Panel& panel) {
  LargestGradient<T> largest;
  for_each_piece(layer, panel, [&](const Place& place) {
    with_type(place.part.gradient, [&](const auto* gradient) {
      // Rows without gaps are one long row: the lanes of a vector are compared at its end. Of rows
      // whose channels are apart, any share of memory will do.
      if (place.part.apart > 0) {
        return largest.look(gradient + place.part_row * place.columns, place.rows * place.columns);
      }
      const bool gaps = place.part.gradient_stride != place.columns;
      const int64_t rows = gaps ? place.rows : 1;
      const int64_t columns = gaps ? place.columns : place.rows * place.columns;
      for (int64_t i = 0; i < rows; ++i) largest.look(gradient + place.gradient_slot(i), columns);
    });
  });
  return largest.value(layer.options.unscale);
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

// Asks for a panel of G, along its rows.
template <class T>
SINGD_INLINE void ask_for_gradient(const StepLayer<T>& layer, const Panel& panel) {
  for_each_place(layer, panel, [&](const Place& place) {
    with_type(place.part.gradient, [&](const auto* gradient) {
      const int64_t bytes = place.columns * static_cast<int64_t>(sizeof(*gradient));
      const auto line = [&](int64_t r, int64_t at) {
        return reinterpret_cast<const char*>(gradient + place.gradient_slot(r)) + at;
      };
      const auto ask = [&](auto... rows) {
        for (int64_t at = 0; at < bytes; at += kLineBytes) {
          (__builtin_prefetch(line(rows, at), 0, 2), ...);
        }
      };
      for_each_four(place.rows, ask, ask);
    });
  });
}

// The rows of G behind those of a panel, for the tiles of its thin products.
template <class T>
AskedRows ahead_of_rows(const StepLayer<T>& layer, int64_t begin, int64_t end) {
  const int64_t tiles = layer.left.border() * layer.columns / kTileNumbers<T>;
  AskedRows asked;
  const Panel panel{begin, end, 0, layer.columns};
  for_each_place(layer, panel, [&](const Place& place) {
    if (place.part.is_line()) return;  // a bias
    with_type(place.part.gradient, [&](const auto* gradient) {
      asked = asked_rows(gradient + place.gradient_slot(0), place.rows, place.columns,
                         place.part.gradient_stride, tiles, false);
    });
  });
  return asked;
}

// P[B, :] G of the panel's rows, in squares that stay in the first cache.
template <class T>
double thin_products_of_many(const StepLayer<T>& layer, const Panel& panel, T* products,
                             T* scratch) {
  const LocalProduct<T>& left = layer.left;
  const int64_t wide = left.wide_stride(), stride = spaced(layer.columns);
  LargestGradient<T> largest;
  for (int64_t begin = panel.row_begin; begin < panel.row_end; begin += kThinRows) {
    const int64_t end = smaller(begin + kThinRows, panel.row_end);
    Ahead ahead;
    if (!layer.options.ask || begin == panel.row_begin) {
      ask_for_gradient(layer, {begin, end, 0, layer.columns});
    }
    if (layer.options.ask && end < panel.row_end) {
      ahead.first = ahead_of_rows(layer, end, smaller(end + kThinRows, panel.row_end));
    }
    for (int64_t column = 0; column < layer.columns; column += kThinColumns) {
      const Panel square{begin, end, column, smaller(column + kThinColumns, layer.columns)};
      load_gradient<T>(layer, square, nullptr, nullptr, scratch, square.stride(),
                       [&](const auto* row, int64_t count) { largest.look(row, count); });
      multiply_from_left(left.border(), padded(square.column_end - column), end - begin, left.wide,
                         wide, begin, scratch, square.stride(), layer.options.unscale == 1,
                         products + column, stride,
                         begin > panel.row_begin ? kAdd<T> : kOverwrite<T>, ahead);
      for_each_arrow_row(layer, begin, end, [&](int64_t i, int64_t r) {
        __builtin_memcpy(layer.border_rows + r * stride + column,
                         scratch + (i - begin) * square.stride(),
                         static_cast<std::size_t>(padded(square.column_end - column)) * sizeof(T));
      });
    }
  }
  return largest.value(layer.options.unscale);
}

// The same for a border of one row: a weighted sum of rows, taken from where they are.
template <class T>
double thin_products_of_one(const StepLayer<T>& layer, const Panel& panel, T* sums) {
  const T unscale = static_cast<T>(layer.options.unscale);
  auto most = magnitude_bits(T(0));
  for (int64_t j = 0; j < padded(layer.columns); ++j) sums[j] = T(0);
  for_each_piece(layer, panel, [&](const Place& place) {
    with_type(place.part.gradient, [&](const auto* gradient) {
      T* sum = sums + place.at;
      const T* weights = layer.left.wide + place.row;
      const int64_t rows = place.rows, count = place.columns;
      const auto row_at = [&](int64_t r) { return gradient + place.gradient_slot(r); };
      const auto number = [&](auto stored) {
        const T x = unscale * static_cast<T>(widen(stored));
        most = larger(most, magnitude_bits(x));
        return x;
      };
      SINGD_COUNT(multiply_adds, rows * count);
      const auto add_four = [&](int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
        const auto *x0 = row_at(i0), *x1 = row_at(i1), *x2 = row_at(i2), *x3 = row_at(i3);
        const T w0 = weights[i0], w1 = weights[i1], w2 = weights[i2], w3 = weights[i3];
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          sum[j] +=
              (w0 * number(x0[j]) + w1 * number(x1[j])) + (w2 * number(x2[j]) + w3 * number(x3[j]));
        }
      };
      const auto add_one = [&](int64_t i) {
        const auto* x = row_at(i);
        const T w = weights[i];
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) sum[j] += w * number(x[j]);
      };
      for_each_four(rows, add_four, add_one);
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
  const bool one = layer.left.border() == 1 && !layer.has_taps();
  return one ? thin_products_of_one(layer, panel, products)
             : thin_products_of_many(layer, panel, products, scratch);
}

template <class T>
void add_products(const StepLayer<T>& layer, const T* products) {
  const int64_t count = padded(layer.columns), stride = spaced(layer.columns);
  for (int64_t r = 0; r < layer.left.border(); ++r) {
    const T* from = products + r * stride;
    T* to = layer.border_products + r * stride;
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) to[j] += from[j];
  }
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
  const int64_t b = layer.left.border(), stride = spaced(layer.columns);
  if (layer.left.form == Form::kNumbers) return;
  zero_behind(layer.left, border_coefficients(layer), b, stride);
  split_right(border_coefficients(layer), layer.left.rows_of(b), stride);
#endif
}
