// The step of a panel of W: its gradient is brought into scratch, multiplied by C C^T from the left
// and K K^T from the right, and written to momentum and weight in the same visit.

// The panel's piece of every part: f(part, first column in the panel, first column in the part,
// columns).
template <class T, class Function>
SINGD_INLINE void for_each_piece(const StepLayer<T>& layer, const Panel& panel, Function f) {
  for (int i = 0; i < layer.num_parts; ++i) {
    const StepPart& part = layer.parts[i];
    const int64_t begin = larger(part.begin, panel.column_begin);
    const int64_t end = smaller(part.begin + part.width, panel.column_end);
    if (begin >= end) continue;
    SINGD_COUNT(elements, (panel.row_end - panel.row_begin) * (end - begin));
    f(part, begin - panel.column_begin, begin - part.begin, end - begin);
  }
}

// Rows of unscale G, `stride` apart with zeros between; row i is multiplied by row_scale[i] too,
// where given.
template <class T>
void load_gradient(const StepLayer<T>& layer, const Panel& panel, const T* row_scale, T* to,
                   int64_t stride) {
  const int64_t rows = panel.row_end - panel.row_begin;
  const T unscale = static_cast<T>(layer.options.unscale);
  for_each_piece(layer, panel, [&](const StepPart& part, int64_t at, int64_t first, int64_t count) {
    with_type(part.gradient, [&](const auto* gradient) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = panel.row_begin + i;
        const T scale = row_scale != nullptr ? unscale * row_scale[row] : unscale;
        load_row(gradient + row * part.gradient_stride + first, count, scale, to + i * stride + at);
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

// P[B, :] G for a panel of columns, all rows of it, in chunks that stay in the first cache.
template <class T>
double thin_products(const StepLayer<T>& layer, const Panel& panel, T* scratch) {
  const LocalProduct<T>& left = layer.left;
  const int64_t width = padded(panel.column_end - panel.column_begin), wide = padded(layer.rows);
  const int64_t stride = padded(layer.columns), border = left.border();
  const int64_t step = panel.thin_rows();
  auto most = magnitude_bits(T(0));
  for (int64_t begin = 0; begin < layer.rows; begin += step) {
    const int64_t end = smaller(begin + step, layer.rows);
    const Panel chunk{begin, end, panel.column_begin, panel.column_end};
    load_gradient<T>(layer, chunk, nullptr, scratch, chunk.stride());
    most = larger(most, largest_bits(scratch, chunk.scratch()));
    multiply<T>(border, width, end - begin, {left.wide + begin, wide, 1}, scratch, chunk.stride(),
                layer.border_products + panel.column_begin, stride,
                begin > 0 ? kAdd<T> : kOverwrite<T>);
    for (int64_t i = begin; i < end && left.kind == LocalKind::kRowBorder; ++i) {
      const int64_t tail = layer.rows - left.layout.tail;
      if (i >= left.layout.head && i < tail) continue;
      const int64_t r = i < left.layout.head ? i : left.layout.head + i - tail;
      __builtin_memcpy(layer.border_rows + r * stride + panel.column_begin,
                       scratch + (i - begin) * chunk.stride(),
                       static_cast<std::size_t>(width) * sizeof(T));
    }
  }
  return most >= kInfinityBits<T> ? __builtin_inf() : static_cast<double>(magnitude_of(most));
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
  const bool arrow = left.kind == LocalKind::kRowBorder;
  const int64_t rows = panel.row_end - panel.row_begin, b = left.border();
  const int64_t all = padded(layer.columns), thin = padded(b);
  const T* coefficients = (arrow ? layer.border_rows : layer.border_products) + panel.column_begin;
  multiply<T>(rows, width, b, {left.thin + panel.row_begin * thin, thin, 1}, coefficients, all, x,
              stride, kAdd<T>);
  const int64_t tail = layer.rows - left.layout.tail;
  for (int64_t i = panel.row_begin; arrow && i < panel.row_end; ++i) {
    if (i >= left.layout.head && i < tail) continue;
    const int64_t r = i < left.layout.head ? i : left.layout.head + i - tail;
    __builtin_memcpy(x + (i - panel.row_begin) * stride,
                     layer.border_products + r * all + panel.column_begin,
                     static_cast<std::size_t>(width) * sizeof(T));
  }
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

template <class T>
void multiply_right_border(const StepLayer<T>& layer, const Panel& panel, T* x, T* scratch) {
  const LocalProduct<T>& right = layer.right;
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

struct WriteCoefficients {
  double lr, momentum, weight_decay;
};

// M <- alpha2 M + P + gamma W and W <- W - beta2 M along a row, with P[j] = row_scale
// column_scale[j] gradient[j]; M stays in a register. The new W goes to `to`, which may be W.
template <bool kMomentum, class T, class Gradient, class Weight, class Momentum>
SINGD_INLINE void write_row(const Gradient* gradient, T row_scale, const T* column_scale,
                            int64_t count, const WriteCoefficients& c, const Weight* weight,
                            Weight* to, Momentum* momentum) {
  const T lr = static_cast<T>(c.lr), alpha = static_cast<T>(c.momentum);
  const T decay = static_cast<T>(c.weight_decay);
  const auto element = [&](int64_t j, T scale) {
    const T w = static_cast<T>(widen(weight[j]));
    T step = static_cast<T>(widen(gradient[j])) * scale + decay * w;
    if (kMomentum) step += alpha * static_cast<T>(widen(momentum[j]));
    if (kMomentum) momentum[j] = Narrow<Momentum>::of(step);
    to[j] = Narrow<Weight>::of(w - lr * step);
  };
  if (column_scale != nullptr) {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) element(j, row_scale * column_scale[j]);
  } else {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) element(j, row_scale);
  }
}

template <class Stored>
struct Stochastic {
  template <class T>
  SINGD_INLINE static Stored of(T value, const RoundingKey&, int64_t) {
    return Narrow<Stored>::of(value);
  }
};

template <>
struct Stochastic<BFloat16> {
  template <class T>
  SINGD_INLINE static BFloat16 of(T value, const RoundingKey& key, int64_t index) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(value));
    const bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
    return finite ? BFloat16{key.round_to_bfloat16(bits, index)} : Narrow<BFloat16>::of(value);
  }
};

// The same with bfloat16 stores rounded stochastically; `index` is that of the first element.
template <class T, class Gradient, class Weight, class Momentum>
SINGD_INLINE void write_row_stochastic(const Gradient* gradient, T row_scale, const T* column_scale,
                                       int64_t count, const WriteCoefficients& c,
                                       const Weight* weight, Weight* to, Momentum* momentum,
                                       const RoundingKey& key, int64_t index) {
  const RoundingKey momentum_key = key.stream(0), weight_key = key.stream(1);
  for (int64_t j = 0; j < count; ++j) {
    const T w = static_cast<T>(widen(weight[j]));
    const T scale = column_scale != nullptr ? row_scale * column_scale[j] : row_scale;
    T step = static_cast<T>(widen(gradient[j])) * scale + static_cast<T>(c.weight_decay) * w;
    if (momentum != nullptr) {
      step += static_cast<T>(c.momentum) * static_cast<T>(widen(momentum[j]));
      momentum[j] = Stochastic<Momentum>::of(step, momentum_key, index + j);
    }
    to[j] = Stochastic<Weight>::of(w - static_cast<T>(c.lr) * step, weight_key, index + j);
  }
}

// `count` numbers of a parameter and its momentum from number `at` on, which have consecutive
// gradients.
template <class T, class Gradient, class Weight, class Momentum>
SINGD_INLINE void write_numbers(const StepOptions& options, const RoundingKey& key, int64_t at,
                                int64_t count, const Gradient* gradient, T row_scale,
                                const T* column_scale, Weight* weight, Momentum* momentum) {
  const WriteCoefficients c{options.lr, options.momentum, options.weight_decay};
  const auto write = [&](int64_t first, int64_t n, Weight* to) {
    const Gradient* g = gradient + first;
    const T* scale = column_scale != nullptr ? column_scale + first : nullptr;
    const Weight* w = weight + at + first;
    Momentum* m = momentum != nullptr ? momentum + at + first : nullptr;
    if (key.enabled) {
      write_row_stochastic(g, row_scale, scale, n, c, w, to, m, key, at + first);
    } else if (m != nullptr) {
      write_row<true>(g, row_scale, scale, n, c, w, to, m);
    } else {
      write_row<false>(g, row_scale, scale, n, c, w, to, m);
    }
  };
  if (!options.stream) return write(0, count, weight + at);
  constexpr int64_t kChunk = 1024 / static_cast<int64_t>(sizeof(Weight));
  alignas(64) Weight chunk[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t n = smaller(kChunk, count - first);
    write(first, n, chunk);
    stream(weight + at + first, chunk, n);
  }
}

// Writes the rows of one piece of a parameter of type Weight and its momentum: row i has the
// gradient `gradient + i gradient_stride`, times row_scale(i) and the column scale.
template <class T, class Gradient, class Weight, class Momentum, class RowScale>
SINGD_INLINE void write_rows(const StepLayer<T>& layer, const Panel& panel, const StepPart& part,
                             int64_t first, int64_t count, const Gradient* gradient,
                             int64_t gradient_stride, RowScale row_scale, const T* column_scale,
                             Weight* weight, Momentum* momentum) {
  for (int64_t i = panel.row_begin; i < panel.row_end; ++i) {
    const Gradient* row = gradient + (i - panel.row_begin) * gradient_stride;
    write_numbers<T>(layer.options, part.key, i * part.width + first, count, row, row_scale(i),
                     column_scale, weight, momentum);
  }
}

template <class T>
const T* part_of(const T* column_scale, int64_t begin) {
  return column_scale != nullptr ? column_scale + begin : nullptr;
}

// The same for a part of one column, a bias: its numbers are consecutive.
template <class T, class Weight, class Momentum>
SINGD_INLINE void write_column(const StepLayer<T>& layer, const Panel& panel, const StepPart& part,
                               const T* column, int64_t stride, T scale, Weight* weight,
                               Momentum* momentum) {
  constexpr int64_t kChunk = 64;
  T chunk[kChunk];
  for (int64_t row = panel.row_begin; row < panel.row_end; row += kChunk) {
    const int64_t n = smaller(kChunk, panel.row_end - row);
    for (int64_t i = 0; i < n; ++i) chunk[i] = column[(row - panel.row_begin + i) * stride];
    write_numbers<T, T>(layer.options, part.key, row, n, chunk, scale, nullptr, weight, momentum);
  }
}

template <class T>
void write_panel(const StepLayer<T>& layer, const Panel& panel, const T* x, const T* column_scale) {
  const auto one = [](int64_t) { return T(1); };
  for_each_piece(layer, panel, [&](const StepPart& part, int64_t at, int64_t first, int64_t count) {
    const T* scale = part_of(column_scale, panel.column_begin + at);
    Array momentum = part.momentum;
    if (momentum.data == nullptr) momentum.type = part.weight.type;
    with_type(part.weight, [&](auto* weight) {
      with_type(momentum, [&](auto* buffer) {
        if (part.width == 1) {
          return write_column<T>(layer, panel, part, x + at, panel.stride(),
                                 scale != nullptr ? *scale : T(1), weight, buffer);
        }
        write_rows<T>(layer, panel, part, first, count, x + at, panel.stride(), one, scale, weight,
                      buffer);
      });
    });
  });
}

// Diagonal products need no scratch. A parameter, its momentum and its gradient have one type, as
// they have in training; other cases go through scratch.
template <class T>
bool is_pointwise(const StepLayer<T>& layer) {
  bool same = layer.left.is_pointwise() && layer.right.is_pointwise();
  for (int i = 0; i < layer.num_parts; ++i) {
    const StepPart& part = layer.parts[i];
    same &= part.gradient.type == part.weight.type;
    same &= part.momentum.data == nullptr || part.momentum.type == part.weight.type;
  }
  return same;
}

template <class T>
void write_pointwise(const StepLayer<T>& layer, const Panel& panel) {
  const T unscale = static_cast<T>(layer.options.unscale);
  const T* diagonal = layer.left.diagonal;
  const auto row_scale = [&](int64_t i) {
    return diagonal != nullptr ? unscale * diagonal[i] : unscale;
  };
  for_each_piece(layer, panel, [&](const StepPart& part, int64_t at, int64_t first, int64_t count) {
    const T* scale = part_of(layer.right.diagonal, panel.column_begin + at);
    with_type(part.weight, [&](auto* weight) {
      const auto* gradient = static_cast<decltype(weight)>(const_cast<void*>(part.gradient.data));
      auto* momentum = static_cast<decltype(weight)>(part.momentum.data);
      if (part.width == 1 && part.gradient_stride == 1) {  // a bias: a row of all its numbers
        const int64_t begin = panel.row_begin;
        return write_numbers<T>(layer.options, part.key, begin, panel.row_end - begin,
                                gradient + begin, scale != nullptr ? unscale * *scale : unscale,
                                part_of(diagonal, begin), weight, momentum);
      }
      write_rows<T>(layer, panel, part, first, count,
                    gradient + panel.row_begin * part.gradient_stride + first, part.gradient_stride,
                    row_scale, scale, weight, momentum);
    });
  });
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
  load_gradient<T>(layer, panel, layer.left.diagonal, x, panel.stride());
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
  load_gradient<T>(layer, panel, nullptr, to, stride);
}

template <class T>
constexpr StepKernels<T> step_kernels() {
  return {prepare_product<T>, load_unscaled<T>, largest_gradient<T>, thin_products<T>,
          step_panel<T>};
}
