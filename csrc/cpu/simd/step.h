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
    if (begin < end) f(part, begin - panel.column_begin, begin - part.begin, end - begin);
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
      for (int64_t i = panel.row_begin; i < panel.row_end; ++i) {
        const auto* row = gradient + i * part.gradient_stride + first;
        for (int64_t j = 0; j < count; ++j) {
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
  auto most = magnitude_bits(T(0));
  for (int64_t begin = 0; begin < layer.rows; begin += kThinRows) {
    const int64_t end = smaller(begin + kThinRows, layer.rows);
    const Panel chunk{begin, end, panel.column_begin, panel.column_end};
    load_gradient<T>(layer, chunk, nullptr, scratch, chunk.stride());
    most = larger(most, largest_bits(scratch, chunk.scratch()));
    multiply<T>(border, width, end - begin, {left.wide + begin, wide, 1}, scratch, chunk.stride(),
                layer.border_products + panel.column_begin, stride, begin > 0);
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
                  other + row, stride, false);
    });
    return other;
  }
  if (!left.has_border()) return x;
  const bool arrow = left.kind == LocalKind::kRowBorder;
  const int64_t rows = panel.row_end - panel.row_begin, b = left.border();
  const int64_t all = padded(layer.columns), thin = padded(b);
  const T* coefficients = (arrow ? layer.border_rows : layer.border_products) + panel.column_begin;
  multiply<T>(rows, width, b, {left.thin + panel.row_begin * thin, thin, 1}, coefficients, all, x,
              stride, true);
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
                padded(size), other + column, stride, false);
  });
  return other;
}

template <class T>
void multiply_right_border(const StepLayer<T>& layer, const Panel& panel, T* x, T* scratch) {
  const LocalProduct<T>& right = layer.right;
  const int64_t d = layer.columns, b = right.border(), thin = padded(b), wide = padded(d);
  const int64_t stride = panel.stride(), rows = panel.row_end - panel.row_begin;
  const int64_t head = right.layout.head, tail = d - right.layout.tail;
  const bool arrow = right.kind == LocalKind::kRowBorder;
  T *products = scratch, *coefficients = scratch + rows * thin;
  multiply<T>(rows, thin, d, {x, stride, 1}, right.thin, thin, products, thin, false);
  for (int64_t i = 0; i < rows; ++i) {
    T* row = x + i * stride;
    for (int64_t r = 0; arrow && r < b; ++r) {
      coefficients[i * thin + r] = row[r < head ? r : r + d - b];
    }
#pragma GCC ivdep
    for (int64_t j = 0; j < d; ++j) row[j] *= right.diagonal[j];
  }
  multiply<T>(rows, wide, b, {arrow ? coefficients : products, thin, 1}, right.wide, wide, x,
              stride, true);
  for (int64_t i = 0; arrow && i < rows; ++i) {
    for (int64_t r = 0; r < b; ++r) {
      x[i * stride + (r < head ? r : r + tail - head)] = products[i * thin + r];
    }
  }
}

struct WriteCoefficients {
  double lr, momentum, weight_decay;
};

// M <- alpha2 M + scale P + gamma W and W <- W - beta2 M along a row; M stays in a register.
template <bool kMomentum, class T, class Weight, class Momentum>
SINGD_INLINE void write_row(const T* gradient, const T* column_scale, int64_t count,
                            const WriteCoefficients& c, Weight* weight, Momentum* momentum) {
  const T lr = static_cast<T>(c.lr), alpha = static_cast<T>(c.momentum);
  const T decay = static_cast<T>(c.weight_decay);
  if (column_scale != nullptr) {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      const T w = static_cast<T>(widen(weight[j]));
      T step = gradient[j] * column_scale[j] + decay * w;
      if (kMomentum) step += alpha * static_cast<T>(widen(momentum[j]));
      if (kMomentum) momentum[j] = Narrow<Momentum>::of(step);
      weight[j] = Narrow<Weight>::of(w - lr * step);
    }
  } else {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      const T w = static_cast<T>(widen(weight[j]));
      T step = gradient[j] + decay * w;
      if (kMomentum) step += alpha * static_cast<T>(widen(momentum[j]));
      if (kMomentum) momentum[j] = Narrow<Momentum>::of(step);
      weight[j] = Narrow<Weight>::of(w - lr * step);
    }
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
template <class T, class Weight, class Momentum>
void write_row_stochastic(const T* gradient, const T* column_scale, int64_t count,
                          const WriteCoefficients& c, Weight* weight, Momentum* momentum,
                          const RoundingKey& key, int64_t index) {
  for (int64_t j = 0; j < count; ++j) {
    const T w = static_cast<T>(widen(weight[j]));
    const T scale = column_scale != nullptr ? column_scale[j] : T(1);
    T step = gradient[j] * scale + static_cast<T>(c.weight_decay) * w;
    if (momentum != nullptr) {
      step += static_cast<T>(c.momentum) * static_cast<T>(widen(momentum[j]));
      momentum[j] = Stochastic<Momentum>::of(step, key.stream(0), index + j);
    }
    weight[j] = Stochastic<Weight>::of(w - static_cast<T>(c.lr) * step, key.stream(1), index + j);
  }
}

template <class T>
void write_panel(const StepLayer<T>& layer, const Panel& panel, const T* x, const T* column_scale) {
  const int64_t stride = panel.stride();
  const WriteCoefficients c{layer.options.lr, layer.options.momentum, layer.options.weight_decay};
  for_each_piece(layer, panel, [&](const StepPart& part, int64_t at, int64_t first, int64_t count) {
    const T* scale = column_scale != nullptr ? column_scale + panel.column_begin + at : nullptr;
    with_type(part.weight, [&](auto* weight) {
      using Weight = typename Pointee<decltype(weight)>::type;
      Array momentum = part.momentum;
      if (momentum.data == nullptr) momentum.type = part.weight.type;
      with_type(momentum, [&](auto* buffer) {
        for (int64_t i = panel.row_begin; i < panel.row_end; ++i) {
          const T* gradient = x + (i - panel.row_begin) * stride + at;
          const int64_t to = i * part.width + first;
          if (part.key.enabled) {
            write_row_stochastic(gradient, scale, count, c, weight + to,
                                 buffer != nullptr ? buffer + to : buffer, part.key, to);
          } else if (buffer != nullptr) {
            write_row<true>(gradient, scale, count, c, weight + to, buffer + to);
          } else {
            write_row<false>(gradient, scale, count, c, weight + to, static_cast<Weight*>(nullptr));
          }
        }
      });
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
