// update_factors_ for diagonal, block-diagonal and bordered factors: H and Pi(K^T K), then the
// candidates of momentum and factor. Formulas are those of csrc/structures; K and what multiplies
// from the right have kPadding readable numbers behind them.

template <class T>
struct Numbers {
  T *k, *h, *gram;

  explicit Numbers(const FactorTask& task)
      : k(static_cast<T*>(task.k)),
        h(static_cast<T*>(task.h)),
        gram(static_cast<T*>(task.gram.data)) {}
};

// f(slot) for every diagonal entry of a diagonal or bordered factor.
template <class Function>
SINGD_INLINE void for_each_diagonal(const Layout& layout, Function f) {
  const int64_t d = layout.dim, border = layout.head + layout.tail;
  for (int64_t r = 0; r < border; ++r) f(r * d + (r < layout.head ? r : r + d - border));
  for (int64_t j = 0; j < d - border; ++j) f(border * d + j);
}

// A whole vector of numbers as float64.
SINGD_INLINE Vector<double> load_doubles(const double* from) { return load(from); }
SINGD_INLINE Vector<double> load_doubles(const float* from) {
  typedef float Half __attribute__((vector_size(SINGD_VECTOR_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, Vector<double>);
}

template <class T>
double sum_of(const T* numbers, int64_t count) {
  Vector<double> sums = {};
  int64_t j = 0;
  for (; j + kLanes<double> <= count; j += kLanes<double>) sums += load_doubles(numbers + j);
  double sum = lane_sum<double>(sums);
  for (; j < count; ++j) sum += static_cast<double>(numbers[j]);
  return sum;
}

template <class T>
double mean_diagonal(const Layout& layout, const T* numbers) {
  double sum = 0;
  for_each_diagonal(layout, [&](int64_t slot) { sum += static_cast<double>(numbers[slot]); });
  return sum / static_cast<double>(layout.dim);
}

// ---- H = Pi(K^T U K) and Pi(K^T K) ----

template <class T>
void diagonal_curvature(FactorTask& task, const T* u) {
  const Numbers<T> n(task);
  for (int64_t j = 0; j < task.layout.dim; ++j) {
    n.gram[j] = n.k[j] * n.k[j];
    n.h[j] = n.k[j] * u[j] * n.k[j];
  }
  task.mean_trace_h = mean_diagonal(task.layout, n.h) * task.scale;
  task.mean_trace_gram = mean_diagonal(task.layout, n.gram);
}

// A bordered matrix R = [E; D] in its storage, and what products with it share.
template <class T>
struct Border {
  int64_t d, head, tail, border, wide;

  explicit Border(const Layout& layout)
      : d(layout.dim),
        head(layout.head),
        tail(layout.tail),
        border(layout.head + layout.tail),
        wide(padded(layout.dim)) {}

  int64_t interior() const { return d - border; }
  const T* diagonal(const T* storage) const { return storage + border * d; }

  // f(row of the border, column of the border, that column's index) for all of E[:, B].
  template <class Function>
  SINGD_INLINE void for_each_core(Function f) const {
    for (int64_t r = 0; r < border; ++r) {
      for (int64_t c = 0; c < head; ++c) f(r, c, c);
      for (int64_t c = head; c < border; ++c) f(r, c, c + interior());
    }
  }

  // core = E[:, B].
  void gather_core(const T* storage, T* core) const {
    for_each_core([&](int64_t r, int64_t c, int64_t column) {
      core[r * border + c] = storage[r * d + column];
    });
  }

  // D, with zeros on the border. to: wide.
  void spread_diagonal(const T* storage, T* to) const {
    for (int64_t j = 0; j < wide; ++j) to[j] = T(0);
    for (int64_t j = 0; j < interior(); ++j) to[head + j] = diagonal(storage)[j];
  }

  // Columns of products at a time: passes over what was just multiplied find it in the first cache.
  static constexpr int64_t kStrip = 128;

  // f(begin, end, width): columns [begin, end) of the matrix, `width` with padding.
  template <class Function>
  SINGD_INLINE void for_each_strip(Function f) const {
    for (int64_t j = 0; j < wide; j += kStrip) {
      f(j, smaller(d, j + kStrip), smaller(wide - j, kStrip));
    }
  }

  // factor E R' for R' = [E'; D'], that is E[:, B] E' + E diag(D'). rows(r, begin, end, x, e, s)
  // for columns [begin, end) of row r: x + e s is the result there. No product without the factor
  // is made: it could overflow. scratch: border wide + border^2 + wide.
  template <class Rows>
  void multiply_rows(const T* e, const T* other, T factor, T* scratch, Rows rows) const {
    T *product = scratch, *core = scratch + border * wide, *scale = core + border * border;
    gather_core(e, core);
    spread_diagonal(other, scale);
    for (int64_t j = 0; j < border * border; ++j) core[j] *= factor;
    for (int64_t j = 0; j < wide; ++j) scale[j] *= factor;
    for_each_strip([&](int64_t begin, int64_t end, int64_t width) {
      multiply<T>(border, width, border, {core, border, 1}, other + begin, d, product + begin, wide,
                  kOverwrite<T>);
      for (int64_t r = 0; r < border; ++r) {
        rows(r, begin, end, product + r * wide, e + r * d, scale);
      }
    });
  }

  // Row r of rows `wide` apart to the storage, times the weights of Pi.
  void store_weighted(const T* from, int64_t r, T* to) const {
    const bool is_tail = r >= head;
    const T* row = from + r * wide;
    T* out = to + r * d;
    const int64_t end = d - tail;
    copy_scaled(row + head, interior(), T(2), out + head);
    if (is_tail) {
      for (int64_t j = 0; j < head; ++j) out[j] = T(0);
    } else {
      copy_scaled(row, head, T(1), out);
    }
    copy_scaled(row + end, tail, T(is_tail ? 1 : 2), out + end);
  }
};

// Rows of the tiles by which blocks of at least so many are multiplied: these are large enough to
// ask for what comes after them.
constexpr int64_t kBlockTileRows = 2 * SINGD_TILE_ROWS;

// Whether tiles of its products ask for what is read, which they do where they are large.
SINGD_INLINE bool tiles_ask(const Layout& layout) {
  if (layout.family == Family::kBlockDiagonal) return layout.block >= kBlockTileRows;
  return !layout.transposed && layout.head + layout.tail >= SINGD_TILE_ROWS;
}

// An array of the factor's that so many tiles ask for.
SINGD_INLINE AskedRows asked_array(const FactorTask& task, const ConstArray& array, int64_t tiles) {
  if (array.data == nullptr) return {};
  const int64_t bytes = task.size * size_of(array.type);
  return {static_cast<const char*>(array.data), 1, bytes, 0,
          bytes / kLineBytes / larger<int64_t>(1, tiles) + 1};
}

// K = R: U K = U[:, B] E + U diag(D) is kept in the place of H, in rows `wide` apart. One product
// of the momentum by K^T makes the border's rows of H and Pi(K^T K) from it; their diagonals are
// kept in the place of the latter, `wide` apart. scratch: border^2 + wide.
template <class T>
void row_border_curvature(FactorTask& task, const T* u, T* scratch) {
  const Numbers<T> n(task);
  const Border<T> b(task.layout);
  Ahead ahead{{},
              asked_array(task, {task.momentum.data, task.momentum.type},
                          b.border * b.wide / kTileNumbers<T>)};
  // The statistic's columns of a strip, by the tiles of the one before.
  const auto ask_for_strip = [&](int64_t begin) {
    const int64_t tiles = b.border * b.kStrip / kTileNumbers<T>;
    const int64_t count = smaller(b.kStrip, b.d - begin);
    ahead.first = {};
    if (count > 0) ahead.first = asked_rows(u + begin, b.border, count, b.d, tiles, false);
  };
  ask_for_strip(0);
  while (tiles_ask(task.layout) && ahead.first.rows > 0) ahead.first.ask_for_line();
  T *core = scratch, *diagonal = scratch + b.border * b.border;
  T *gram = n.gram, *h = gram + b.wide;
  b.gather_core(u, core);
  b.spread_diagonal(n.k, diagonal);
  b.spread_diagonal(u, h);
  b.for_each_strip([&](int64_t begin, int64_t end, int64_t width) {
    ask_for_strip(begin + width);
    multiply<T>(b.border, width, b.border, {core, b.border, 1}, n.k + begin, b.d, n.h + begin,
                b.wide, kOverwrite<T>, &ahead);
#pragma GCC ivdep
    for (int64_t j = begin; j < end; ++j) {
      gram[j] = diagonal[j] * diagonal[j];
      h[j] *= gram[j];
    }
    for (int64_t r = 0; r < b.border; ++r) {
      const T *e = n.k + r * b.d, *u_row = u + r * b.d;
      T* uk = n.h + r * b.wide;
#pragma GCC ivdep
      for (int64_t j = begin; j < end; ++j) {
        const T scaled = u_row[j] * diagonal[j];
        h[j] += e[j] * (uk[j] + 2 * scaled);
        gram[j] += e[j] * e[j];
        uk[j] += scaled;
      }
    }
  });
  const auto d = static_cast<double>(b.d);
  task.mean_trace_h = sum_of(h, b.d) * task.scale / d;
  task.mean_trace_gram = sum_of(gram, b.d) / d;
}

// K = R^T: the statistic is H, and K^T K = R R^T, of which E E^T is kept in rows padded(border)
// apart. scratch: d padded(border).
template <class T>
void column_border_curvature(FactorTask& task, const T* u, T* scratch) {
  const Numbers<T> n(task);
  const Border<T> b(task.layout);
  const int64_t count = b.interior();
  const int64_t thin = padded(b.border);
  transpose_padded(n.k, b.border, b.d, b.d, scratch, thin);
  multiply<T>(b.border, thin, b.d, {n.k, b.d, 1}, scratch, thin, n.gram, thin, kOverwrite<T>);
  const T* diagonal = b.diagonal(n.k);
  double trace = 0;
  for (int64_t r = 0; r < b.border; ++r) trace += static_cast<double>(n.gram[r * thin + r]);
  for (int64_t j = 0; j < count; ++j) {
    trace += static_cast<double>(diagonal[j] * diagonal[j]);
  }
  task.mean_trace_h = mean_diagonal(task.layout, u) * task.scale;
  task.mean_trace_gram = trace / static_cast<double>(b.d);
}

// h_scale H + gram_scale Pi(K^T K): the interior in the place of H, the border without the weights
// of Pi in scratch, in rows `wide` apart. scratch: border wide + border^2.
template <class T>
void row_border_sum(const FactorTask& task, T h_scale, T gram_scale, T* scratch) {
  const Numbers<T> n(task);
  const Border<T> b(task.layout);
  T *rows = scratch, *core = scratch + b.border * b.wide;
  b.gather_core(n.k, core);
  b.for_each_strip([&](int64_t begin, int64_t, int64_t width) {
    for (int64_t r = 0; r < b.border; ++r) {
      const T* e = n.k + r * b.d;
      T* uk = n.h + r * b.wide;
#pragma GCC ivdep
      for (int64_t j = begin; j < begin + width; ++j) uk[j] = h_scale * uk[j] + gram_scale * e[j];
    }
    multiply<T>(b.border, width, b.border, {core, 1, b.border}, n.h + begin, b.wide, rows + begin,
                b.wide, kOverwrite<T>);
  });
  const int64_t count = b.interior();
  const T *gram = n.gram + b.head, *h = gram + b.wide;
  T* interior = n.h + b.border * b.d;
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) interior[j] = h_scale * h[j] + gram_scale * gram[j];
}

template <class T>
void column_border_sum(const FactorTask& task, T h_scale, T gram_scale, T* scratch) {
  const Numbers<T> n(task);
  const Border<T> b(task.layout);
  const int64_t count = b.interior();
  const int64_t thin = padded(b.border);
  const T *u = static_cast<const T*>(task.statistic.data), *diagonal = b.diagonal(n.k);
  for (int64_t r = 0; r < b.border; ++r) {
    const T *e = n.k + r * b.d + b.head, *u_row = u + r * b.d + b.head;
    T* row = scratch + r * b.wide + b.head;
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      row[j] = h_scale * u_row[j] + gram_scale * (e[j] * diagonal[j]);
    }
  }
  b.for_each_core([&](int64_t r, int64_t c, int64_t column) {
    scratch[r * b.wide + column] =
        h_scale * u[r * b.d + column] + gram_scale * n.gram[r * thin + c];
  });
  const T* u_diagonal = b.diagonal(u);
  T* interior = n.h + b.border * b.d;
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) {
    interior[j] = h_scale * u_diagonal[j] + gram_scale * (diagonal[j] * diagonal[j]);
  }
}
