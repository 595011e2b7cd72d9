// The candidates of a factor and its momentum in update_factors_, in the types that they are stored
// in.

// s (h_scale H + gram_scale Pi(K^T K)) for some slots, in the place of H.
template <class T>
void momentum_range(const FactorTask& task, const FactorTask& partner, const FactorOptions& o,
                    int64_t begin, int64_t end) {
  const Numbers<T> n(task);
  const double h_scale = o.kfac_like ? 1.0 : partner.mean_trace_h;
  const double gram_scale = o.damping * (o.kfac_like ? 1.0 : partner.mean_trace_gram);
  const double s = o.momentum_scale();
  T* m = n.h;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    m[i] = static_cast<T>(
        s * (h_scale * static_cast<double>(m[i]) + gram_scale * static_cast<double>(n.gram[i])));
  }
}

// m += alpha1 times the old momentum, for some slots.
template <class T>
void add_old_momentum(const FactorTask& task, const FactorOptions& o, int64_t begin, int64_t end) {
  if (task.momentum.data == nullptr) return;
  T* m = static_cast<T*>(task.h);
  with_type(ConstArray{task.momentum.data, task.momentum.type}, [&](const auto* previous) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      m[i] += static_cast<T>(o.alpha1 * static_cast<double>(static_cast<T>(widen(previous[i]))));
    }
  });
}

// ---- A bound of the spectral norm: min(Frobenius, sqrt(1-norm infinity-norm)) ----

typedef uint64_t DoubleBits __attribute__((vector_size(SINGD_VECTOR_BYTES)));

SINGD_INLINE Vector<double> load_magnitudes(const double* from) {
  return (Vector<double>)((DoubleBits)load(from) & 0x7fffffffffffffffull);
}
SINGD_INLINE Vector<double> load_magnitudes(const float* from) {
  typedef float Half __attribute__((vector_size(SINGD_VECTOR_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, from, sizeof half);
  const Vector<double> wide = __builtin_convertvector(half, Vector<double>);
  return (Vector<double>)((DoubleBits)wide & 0x7fffffffffffffffull);
}

struct Norms {
  double rows = 0, columns = 0, squares = 0;
  Vector<double> square_sums = {};

  // A row of a matrix: |x| is added to column_sums.
  template <class T>
  SINGD_INLINE void add_row(const T* x, int64_t count, double* column_sums) {
    Vector<double> sums = {};
    int64_t j = 0;
    for (; j + kLanes<double> <= count; j += kLanes<double>) {
      const Vector<double> value = load_magnitudes(x + j);
      sums += value;
      square_sums += value * value;
      store<double>(column_sums + j, load<double>(column_sums + j) + value);
    }
    double sum = lane_sum<double>(sums);
    for (; j < count; ++j) {
      const double value = static_cast<double>(x[j] < 0 ? -x[j] : x[j]);
      sum += value;
      squares += value * value;
      column_sums[j] += value;
    }
    rows = larger(rows, sum);
  }

  // Entries that are alone in their row.
  template <class T>
  void add_diagonal(const T* x, int64_t count, double* column_sums) {
    for (int64_t j = 0; j < count; ++j) {
      const double value = static_cast<double>(x[j] < 0 ? -x[j] : x[j]);
      rows = larger(rows, value);
      squares += value * value;
      column_sums[j] += value;
    }
  }

  void add_columns(const double* column_sums, int64_t count) {
    for (int64_t j = 0; j < count; ++j) columns = larger(columns, column_sums[j]);
  }

  double bound() const {
    const double frobenius = __builtin_sqrt(squares + lane_sum<double>(square_sums));
    return smaller(frobenius, __builtin_sqrt(rows * columns));
  }
};

// scratch: dim numbers of float64.
template <class T>
double norm_bound(const Layout& layout, const T* m, double* column_sums) {
  Norms norms;
  const int64_t d = layout.dim, border = layout.head + layout.tail;
  for (int64_t j = 0; j < d; ++j) column_sums[j] = 0;
  if (layout.family == Family::kBlockDiagonal) {
    for_each_block(layout, [&](int64_t begin, int64_t size, int64_t at, int64_t) {
      for (int64_t i = 0; i < size; ++i) {
        norms.add_row(m + at + i * size, size, column_sums + begin);
      }
    });
  } else if (layout.family == Family::kDense) {
    for (int64_t i = 0; i < d; ++i) norms.add_row(m + i * d, d, column_sums);
  } else {
    for (int64_t r = 0; r < border; ++r) norms.add_row(m + r * d, d, column_sums);
    norms.add_diagonal(m + border * d, d - border, column_sums + layout.head);
  }
  norms.add_columns(column_sums, d);
  return norms.bound();
}

// beta1 for a momentum with this bound and this largest entry: normalised if asked for, and such
// that beta1 ||m|| <= step_cap.
SINGD_INLINE double step_size(FactorTask& task, double bound, double largest,
                              const FactorOptions& o) {
  const double beta = o.normalize_lr_cov ? o.lr_cov / larger(1.0, largest) : o.lr_cov;
  task.capped = beta * bound > o.step_cap;
  return task.capped ? o.step_cap / bound : beta;
}

// ---- Stores ----

// Whether numbers are finite as they are stored: one that is can round to infinity.
template <class T, class Stored>
SINGD_INLINE bool are_finite(const Stored* stored, int64_t count) {
  auto most = magnitude_bits(T(0));
  for (int64_t i = 0; i < count; ++i) {
    most = larger(most, magnitude_bits(static_cast<T>(widen(stored[i]))));
  }
  return most < kInfinityBits<T>;
}

// values[i], plus old[i] where given, to slots [begin, end) of the array; whether all are finite.
template <class T>
bool store_numbers(const T* values, const T* old, int64_t begin, int64_t end, const Array& array,
                   const RoundingKey& key) {
  bool finite = true;
  with_type(array, [&](auto* to) {
    using Stored = typename Pointee<decltype(to)>::type;
    const auto value = [&](int64_t i) { return old != nullptr ? values[i] + old[i] : values[i]; };
    if (key.enabled) {
      for (int64_t i = begin; i < end; ++i) to[i] = Stochastic<Stored>::of(value(i), key, i);
    } else {
#pragma GCC ivdep
      for (int64_t i = begin; i < end; ++i) to[i] = Narrow<Stored>::of(value(i));
    }
    finite = are_finite<T>(to + begin, end - begin);
  });
  return finite;
}

// ---- K + K E with E = Expm(-beta m) - I, truncated: E without the identity, whose rounding would
// be that of K itself ----

template <class T>
bool diagonal_candidate(const FactorTask& task, double beta, bool second_order) {
  const Numbers<T> n(task);
  for (int64_t j = 0; j < task.size; ++j) {
    T e = static_cast<T>(-beta * static_cast<double>(n.h[j]));
    if (second_order) e += e * e / 2;
    n.gram[j] = n.k[j] * e;
  }
  return store_numbers(n.gram, n.k, 0, task.size, task.next_factor, task.key.stream(0));
}

// to <- A B of bordered matrices in their storage.
template <class T>
void multiply_borders(const Border<T>& b, const T* first, const T* second, T* to, T* scratch) {
  T* rows = scratch;
  b.multiply_rows(first, second, rows, rows + b.border * b.wide);
  for (int64_t r = 0; r < b.border; ++r) {
    __builtin_memcpy(to + r * b.d, rows + r * b.wide, sizeof(T) * static_cast<size_t>(b.d));
  }
  const int64_t diagonal = b.border * b.d;
  for (int64_t j = 0; j < b.interior(); ++j) {
    to[diagonal + j] = first[diagonal + j] * second[diagonal + j];
  }
}

// scratch: the size of the storage, border wide + border^2 + wide.
template <class T>
bool border_candidate(const FactorTask& task, double beta, bool second_order, T* scratch) {
  const Numbers<T> n(task);
  const Border<T> b(task.layout);
  T *e = n.gram, *product = scratch, *rest = scratch + task.size;
  copy_scaled(n.h, task.size, -beta, e);
  if (second_order) {
    multiply_borders(b, e, e, product, rest);
    for (int64_t i = 0; i < task.size; ++i) e[i] += product[i] / 2;
  }
  const bool swap = task.layout.transposed;  // (K E)^T = E^T K^T
  multiply_borders(b, swap ? e : n.k, swap ? n.k : e, product, rest);
  return store_numbers(product, n.k, 0, task.size, task.next_factor, task.key.stream(0));
}
