// What a step writes: momentum and weight of a panel of W, from its preconditioned gradient.

// What a panel has of a part: so many rows and columns, the first of them in the layer (row), in
// the panel (panel_row, at) and in the part (part_row, first).
struct Place {
  const StepPart& part;
  int64_t rows, columns, row, panel_row, at, part_row, first;

  // Of the part's weight and momentum, and of its gradient: its first number of a row i.
  int64_t slot(int64_t i) const { return (part_row + i) * part.width + first; }
  int64_t gradient_slot(int64_t i) const { return (part_row + i) * part.gradient_stride + first; }
};

// f(place) for every part that the panel has something of.
template <class T, class Function>
SINGD_INLINE void for_each_place(const StepLayer<T>& layer, const Panel& panel, Function f) {
  for (int i = 0; i < layer.num_parts; ++i) {
    const StepPart& part = layer.parts[i];
    const int64_t row = larger(part.row_begin, panel.row_begin);
    const int64_t row_end = smaller(part.row_begin + part.height, panel.row_end);
    const int64_t begin = larger(part.begin, panel.column_begin);
    const int64_t end = smaller(part.begin + part.width, panel.column_end);
    if (row >= row_end || begin >= end) continue;
    f(Place{part, row_end - row, end - begin, row, row - panel.row_begin,
            begin - panel.column_begin, row - part.row_begin, begin - part.begin});
  }
}

// The same where f visits its elements.
template <class T, class Function>
SINGD_INLINE void for_each_piece(const StepLayer<T>& layer, const Panel& panel, Function f) {
  for_each_place(layer, panel, [&](const Place& place) {
    SINGD_COUNT(elements, place.rows * place.columns);
    f(place);
  });
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

#if SINGD_BFLOAT16_PRODUCTS
// The same where one instruction rounds two vectors to bfloat16, which compilers do not see in the
// loop above. It takes subnormal numbers for zero: these are left to that loop.
template <bool kMomentum, class Gradient>
SINGD_INLINE void write_row(const Gradient* gradient, float row_scale, const float* column_scale,
                            int64_t count, const WriteCoefficients& c, const BFloat16* weight,
                            BFloat16* to, BFloat16* momentum) {
  const auto lr = static_cast<float>(c.lr), alpha = static_cast<float>(c.momentum);
  const auto decay = static_cast<float>(c.weight_decay);
  const auto write_exactly = [&](int64_t first, int64_t n) {
    const float* scale = column_scale != nullptr ? column_scale + first : nullptr;
    write_row<kMomentum, float, Gradient, BFloat16, BFloat16>(
        gradient + first, row_scale, scale, n, c, weight + first, to + first,
        kMomentum ? momentum + first : nullptr);
  };
  int64_t j = 0;
  for (; j + 32 <= count; j += 32) {
    Floats g[2], w[2], m[2];
    load_two(gradient + j, g);
    load_two(weight + j, w);
    if (kMomentum) load_two(momentum + j, m);
    for (int i = 0; i < 2; ++i) {
      Floats scale = splat(row_scale);
      if (column_scale != nullptr) scale *= load(column_scale + j + 16 * i);
      const Floats step = g[i] * scale + decay * w[i];
      m[i] = kMomentum ? step + alpha * m[i] : step;
      w[i] -= lr * m[i];
    }
    if ((kMomentum && has_subnormal(m)) || has_subnormal(w)) {
      write_exactly(j, 32);
      continue;
    }
    if (kMomentum) store(reinterpret_cast<uint32_t*>(momentum + j), rounded(m[0], m[1]));
    store(reinterpret_cast<uint32_t*>(to + j), rounded(w[0], w[1]));
  }
  write_exactly(j, count - j);
}
#endif

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

constexpr int64_t kChunkBytes = 1024;  // of a parameter that are written at a time

// Asks for a chunk of a parameter and of its momentum, two chunks behind the ones that begin here.
template <class Weight, class Momentum>
SINGD_INLINE void ask_for_what_follows(const Weight* weight, const Momentum* momentum) {
  const auto* w = reinterpret_cast<const char*>(weight);
  const auto* m = reinterpret_cast<const char*>(momentum);
  for (int64_t i = 2 * kChunkBytes; i < 3 * kChunkBytes; i += kLineBytes) {
    __builtin_prefetch(w + i);
    if (m != nullptr) __builtin_prefetch(m + i);
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
  if (!options.stream && !options.ask) return write(0, count, weight + at);
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Weight));
  alignas(64) Weight chunk[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t n = smaller(kChunk, count - first);
    Weight* to = weight + at + first;
    Momentum* buffer = momentum != nullptr ? momentum + at + first : nullptr;
    if (options.ask) ask_for_what_follows(to, buffer);
    write(first, n, options.stream ? chunk : to);
    if (options.stream) stream(to, chunk, n);
  }
}

// Writes the rows of one place of a parameter of type Weight and its momentum: row i has the
// gradient `gradient + i gradient_stride`, times row_scale(i) and the column scale.
template <class T, class Gradient, class Weight, class Momentum, class RowScale>
SINGD_INLINE void write_rows(const StepLayer<T>& layer, const Place& place,
                             const Gradient* gradient, int64_t gradient_stride, RowScale row_scale,
                             const T* column_scale, Weight* weight, Momentum* momentum) {
  for (int64_t i = 0; i < place.rows; ++i) {
    write_numbers<T>(layer.options, place.part.key, place.slot(i), place.columns,
                     gradient + i * gradient_stride, row_scale(i), column_scale, weight, momentum);
  }
}

// The same for a part of one column, such as a bias: its numbers are consecutive.
template <class T, class Weight, class Momentum>
SINGD_INLINE void write_column(const StepLayer<T>& layer, const Place& place, const T* column,
                               int64_t stride, T scale, Weight* weight, Momentum* momentum) {
  constexpr int64_t kChunk = 64;
  T chunk[kChunk];
  for (int64_t row = 0; row < place.rows; row += kChunk) {
    const int64_t n = smaller(kChunk, place.rows - row);
    for (int64_t i = 0; i < n; ++i) chunk[i] = column[(row + i) * stride];
    write_numbers<T, T>(layer.options, place.part.key, place.slot(row), n, chunk, scale, nullptr,
                        weight, momentum);
  }
}

// f(slot, count, numbers of x, their scales) for the runs in which row i of a place lies in memory.
template <class T, class Function>
SINGD_INLINE void for_each_run(const Place& place, int64_t i, const T* x, const T* column_scale,
                               Function f) {
  if (place.part.taps == 1) return f(place.slot(i), place.columns, x, column_scale);
  const bool apart = place.part.apart > 0;
  const int64_t row = (place.part_row + i) * (apart ? place.part.taps : place.part.width);
  const T* const none = nullptr;
  for_each_tap_run(place.part, place.first, place.columns, x, column_scale,
                   [&](int64_t at, int64_t count, const T* run) { f(row + at, count, run, none); });
}

// The same as write_rows for rows in another order, in runs that are too short to ask for the next.
template <class T, class Weight, class Momentum>
void write_taps(const StepLayer<T>& layer, const Place& place, const T* x, int64_t stride,
                const T* column_scale, Weight* weight, Momentum* momentum) {
  StepOptions options = layer.options;
  options.stream = options.ask = false;
  for (int64_t i = 0; i < place.rows; ++i) {
    for_each_run(place, i, x + i * stride, column_scale,
                 [&](int64_t at, int64_t count, const T* numbers, const T* scale) {
                   write_numbers<T, T>(options, place.part.key, at, count, numbers, T(1), scale,
                                       weight, momentum);
                 });
  }
}

// The panel's place in every part, in the types of its numbers: f(place, its numbers of x, which
// has those of the panel, scales of its columns, weight, momentum).
template <class T, class Function>
SINGD_INLINE void for_each_stored(const StepLayer<T>& layer, const Panel& panel, const T* x,
                                  const T* column_scale, Function f) {
  for_each_piece(layer, panel, [&](const Place& place) {
    const T* own = x + place.panel_row * panel.stride() + place.at;
    const T* scale = part_of(column_scale, panel.column_begin + place.at);
    Array momentum = place.part.momentum;
    if (momentum.data == nullptr) momentum.type = place.part.weight.type;
    with_type(place.part.weight, [&](auto* weight) {
      with_type(momentum, [&](auto* buffer) { f(place, own, scale, weight, buffer); });
    });
  });
}

template <class T>
void write_panel(const StepLayer<T>& layer, const Panel& panel, const T* x, const T* column_scale) {
  const auto one = [](int64_t) { return T(1); };
  for_each_stored(
      layer, panel, x, column_scale,
      [&](const Place& place, const T* own, const T* scale, auto* weight, auto* momentum) {
        if (place.part.width == 1) {
          return write_column<T>(layer, place, own, panel.stride(),
                                 scale != nullptr ? *scale : T(1), weight, momentum);
        }
        if (place.part.taps > 1) {
          return write_taps(layer, place, own, panel.stride(), scale, weight, momentum);
        }
        write_rows<T>(layer, place, own, panel.stride(), one, scale, weight, momentum);
      });
}

// Whether a row of a parameter and its momentum, from their first number on, would be finite as
// they are stored: written to a copy, by the code that writes them.
template <class T, class Weight, class Momentum>
bool row_is_finite(const WriteCoefficients& c, const T* gradient, const T* column_scale,
                   int64_t count, const Weight* weight, const Momentum* momentum) {
  constexpr int64_t kSome = 256;
  Weight next[kSome];
  Momentum moved[kSome];
  bool finite = true;
  for (int64_t first = 0; first < count; first += kSome) {
    const int64_t n = smaller(kSome, count - first);
    const T *g = gradient + first, *scale = part_of(column_scale, first);
    if (momentum != nullptr) {
      __builtin_memcpy(moved, momentum + first, static_cast<std::size_t>(n) * sizeof(Momentum));
      write_row<true>(g, T(1), scale, n, c, weight + first, next, moved);
      finite &= are_finite<T>(moved, n);
    } else {
      write_row<false>(g, T(1), scale, n, c, weight + first, next, moved);
    }
    finite &= are_finite<T>(next, n);
  }
  return finite;
}

// Whether all that write_panel would store is finite.
template <class T>
bool panel_is_finite(const StepLayer<T>& layer, const Panel& panel, const T* x,
                     const T* column_scale) {
  const StepOptions& o = layer.options;
  const WriteCoefficients c{o.lr, o.momentum, o.weight_decay};
  bool finite = true;
  for_each_stored(
      layer, panel, x, column_scale,
      [&](const Place& place, const T* own, const T* scale, auto* weight, auto* momentum) {
        for (int64_t i = 0; i < place.rows; ++i) {
          for_each_run(place, i, own + i * panel.stride(), scale,
                       [&](int64_t from, int64_t count, const T* numbers, const T* by) {
                         finite &= row_is_finite(c, numbers, by, count, weight + from,
                                                 momentum != nullptr ? momentum + from : nullptr);
                       });
        }
      });
  return finite;
}

// Diagonal products need no scratch. A parameter, its momentum and its gradient have one type, as
// they have in training, and its rows are in the order of W; other cases go through scratch.
template <class T>
bool is_pointwise(const StepLayer<T>& layer) {
  bool same = layer.left.is_pointwise() && layer.right.is_pointwise() && !layer.has_taps();
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
  for_each_piece(layer, panel, [&](const Place& place) {
    const StepPart& part = place.part;
    const T* scale = part_of(layer.right.diagonal, panel.column_begin + place.at);
    const auto row_scale = [&](int64_t i) {
      return diagonal != nullptr ? unscale * diagonal[place.row + i] : unscale;
    };
    with_type(part.weight, [&](auto* weight) {
      const auto* gradient = static_cast<decltype(weight)>(const_cast<void*>(part.gradient.data));
      auto* momentum = static_cast<decltype(weight)>(part.momentum.data);
      gradient += place.gradient_slot(0);
      if (part.width == 1 && part.gradient_stride == 1) {  // a bias: a row of all its numbers
        return write_numbers<T>(layer.options, part.key, place.slot(0), place.rows, gradient,
                                scale != nullptr ? unscale * *scale : unscale,
                                part_of(diagonal, place.row), weight, momentum);
      }
      write_rows<T>(layer, place, gradient, part.gradient_stride, row_scale, scale, weight,
                    momentum);
    });
  });
}
