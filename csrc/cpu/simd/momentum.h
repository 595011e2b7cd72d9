// The new momentum of a factor in update_factors_ and what bounds its step, row by row: while a row
// is in the first cache, its terms are added up and so are its norms.

// ---- A bound of the spectral norm: min(Frobenius, sqrt(1-norm infinity-norm)) ----

// Squares of numbers whose sum in their own type may have overflowed.
template <class T>
double sum_of_squares(const T* x, int64_t count) {
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
  return sum;
}
constexpr double kSurelyFinite = 1e38;

// Sums of float64: the largest of rows and of columns, and that of all squares.
struct Norms {
  double rows = 0, columns = 0, squares = 0;
  Vector<double> square_sums = {};

  // A row of a matrix: |x| is added to column_sums.
  template <class T>
  SINGD_INLINE void add_row(const T* x, int64_t count, double* column_sums) {
    Vector<double> sums = {};
    int64_t j = 0;
    for (; j + kLanes<double> <= count; j += kLanes<double>) {
      const Vector<double> value = magnitudes<double>(load_doubles(x + j));
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

  // A block: padded rows, with sums of T, which are short.
  template <class T>
  void add_block(const T* x, int64_t size, int64_t stride) {
    rows = larger(rows, static_cast<double>(largest_row_sum(x, size, stride, stride)));
    columns = larger(columns, static_cast<double>(largest_column_sum(x, size, stride, stride)));
    const auto sum = static_cast<double>(dot_product(x, x, size * stride));
    squares += sum < kSurelyFinite ? sum : sum_of_squares(x, size * stride);
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

  // The numbers of a triangular Toeplitz matrix, which stand on its diagonals.
  template <class T>
  void add_toeplitz(const T* x, int64_t dim, double* column_sums) {
    for (int64_t l = 0; l < dim; ++l) {
      const double value = static_cast<double>(x[l] < 0 ? -x[l] : x[l]);
      rows += value;
      squares += static_cast<double>(dim - l) * value * value;
    }
    column_sums[0] = rows;
  }

  void add_columns(const double* column_sums, int64_t count) {
    for (int64_t j = 0; j < count; ++j) columns = larger(columns, column_sums[j]);
  }

  double all_squares() const { return squares + lane_sum<double>(square_sums); }

  double bound() const {
    const double frobenius = __builtin_sqrt(all_squares());
    return smaller(frobenius, __builtin_sqrt(rows * columns));  // NaN, if the former is
  }
};

// ---- m = s (h_scale H + gram_scale Pi(K^T K) - I) + alpha1 m ----

// Numbers that are converted at a time.
constexpr int64_t kChunk = 256;

// Numbers of an array from `first` on: where they lie, or converted in a chunk.
template <class T>
SINGD_INLINE const T* numbers_of(const Array& array, int64_t first, int64_t count, T* chunk) {
  if (array.type == kScalar<T>) return static_cast<const T*>(array.data) + first;
  with_type(array, [&](const auto* stored) { load_row(stored + first, count, T(1), chunk); });
  return chunk;
}

// Numbers of T to stored ones, whose first has index `first` in its array.
template <class Stored, class T>
SINGD_INLINE void narrow_row(const T* values, int64_t count, const RoundingKey& key, int64_t first,
                             Stored* to) {
  if (key.enabled) {
    for (int64_t i = 0; i < count; ++i) to[i] = Stochastic<Stored>::of(values[i], key, first + i);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) to[i] = Narrow<Stored>::of(values[i]);
  }
}

struct MomentumTerms {
  double h, gram, old, identity;

  MomentumTerms(const FactorTask& task, const FactorTask& partner, const FactorOptions& o) {
    const double s = o.momentum_scale();
    h = s * task.scale * (o.kfac_like ? 1.0 : partner.mean_trace_h);
    gram = s * o.damping * (o.kfac_like ? 1.0 : partner.mean_trace_gram);
    old = o.alpha1;
    identity = s;
  }
};

// What the new momentum is made of in slots [begin, end), from H and Pi(K^T K) where these lack the
// weight of Pi. `m` are the numbers of these slots: H, unless that is the statistic.
template <class T>
void add_curvature(const FactorTask& task, const MomentumTerms& terms, double weight, int64_t begin,
                   int64_t end, T* m) {
  const bool is_dense = task.layout.family == Family::kDense;
  const T* h = is_dense ? static_cast<const T*>(task.statistic.data) + begin : m;
  const T h_scale = static_cast<T>(weight * terms.h);
  const T gram_scale = static_cast<T>(weight * terms.gram);
  T chunk[kChunk];
  const T* gram = numbers_of(task.gram, begin, end - begin, chunk);
#pragma GCC ivdep
  for (int64_t j = 0; j < end - begin; ++j) m[j] = h_scale * h[j] + gram_scale * gram[j];
}

// The new momentum, of which `identity` is subtracted, in slots [begin, end): the numbers m.
template <class T>
void momentum_slots(const FactorTask& task, const MomentumTerms& terms, double weight,
                    double identity, int64_t begin, int64_t end, T* m) {
  const T alpha1 = static_cast<T>(terms.old), one = static_cast<T>(identity);
  T chunk[kChunk];
  for (int64_t first = begin; first < end; first += kChunk, m += kChunk) {
    const int64_t count = smaller(kChunk, end - first);
    if (!task.is_added_up) add_curvature(task, terms, weight, first, first + count, m);
    if (task.momentum.data == nullptr) {
      for (int64_t j = 0; j < count; ++j) m[j] -= one;
      continue;
    }
    const T* old = numbers_of(task.momentum, first, count, chunk);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) m[j] += alpha1 * old[j] - one;
  }
}

// Entries of a row of the matrix from a column on, which lie side by side in the storage.
struct StoredRow {
  int64_t slot, count, column;
  int64_t diagonal;  // which of them is on the diagonal; all, if it is -1
};

// Row `i` of storage_rows.
SINGD_INLINE StoredRow stored_row(const Layout& layout, int64_t i) {
  const int64_t d = layout.dim, border = layout.head + layout.tail;
  switch (layout.family) {
    case Family::kDense:
      return {i * d, d, 0, i};
    case Family::kBlockDiagonal: {
      const int64_t begin = i / layout.block * layout.block;
      const int64_t size = smaller(layout.block, d - begin);
      return {begin * layout.block + (i - begin) * size, size, begin, i - begin};
    }
    case Family::kToeplitz:
      return {0, d, 0, 0};
    default:
      if (i == border) return {border * d, d - border, layout.head, -1};
      return {i * d, d, 0, i < layout.head ? i : i + d - border};
  }
}

// Its numbers m of the new momentum.
template <class T>
void momentum_row(const FactorTask& task, const MomentumTerms& terms, const StoredRow& row, T* m) {
  const auto slots = [&](double weight, double identity, int64_t begin, int64_t end) {
    momentum_slots(task, terms, weight, identity, row.slot + begin, row.slot + end, m + begin);
  };
  if (row.diagonal < 0) return slots(1, terms.identity, 0, row.count);
  const Triangle triangle = task.layout.triangle;
  const double weight = triangle == Triangle::kFull ? 1 : 2;
  const int64_t begin = triangle == Triangle::kUpper ? row.diagonal : 0;
  const int64_t end = triangle == Triangle::kLower ? row.diagonal + 1 : row.count;
  for (int64_t j = 0; j < begin; ++j) m[j] = T(0);
  slots(weight, 0, begin, row.diagonal);
  slots(1, terms.identity, row.diagonal, row.diagonal + 1);
  slots(weight, 0, row.diagonal + 1, end);
  for (int64_t j = end; j < row.count; ++j) m[j] = T(0);
}

// A row of the new momentum as it will be stored. One that is not kept is rounded to nearest.
template <class T>
SINGD_INLINE void round_row(const FactorTask& task, const StoredRow& row, const T* m) {
  const bool kept = task.momentum.data != nullptr;
  with_type(task.new_momentum, [&](auto* to) {
    narrow_row(m, row.count, kept ? task.key.stream(1) : RoundingKey{}, row.slot, to + row.slot);
  });
}

// Rows [begin, end) of the new momentum, where sum(i) makes what row i lacks of H and Pi(K^T K).
template <class T, class Sum>
SINGD_INLINE void make_momentum_rows(const FactorTask& task, const FactorTask& partner,
                                     const FactorOptions& o, int64_t begin, int64_t end,
                                     MomentumSums& sums, Sum sum) {
  const MomentumTerms terms(task, partner, o);
  for (int64_t j = 0; j < task.layout.dim; ++j) sums.columns[j] = 0;
  Norms norms;
  auto most = magnitude_bits(T(0));
  const bool rounded = task.rounds_momentum();
  for (int64_t i = begin; i < end; ++i) {
    const StoredRow row = stored_row(task.layout, i);
    SINGD_COUNT(elements, row.count);
    sum(i);
    T* m = rounded ? static_cast<T*>(sums.row) : static_cast<T*>(task.h) + row.slot;
    momentum_row(task, terms, row, m);
    if (rounded) round_row(task, row, m);
    if (task.layout.family == Family::kToeplitz) {
      norms.add_toeplitz(m, row.count, sums.columns);
    } else if (row.diagonal < 0) {
      norms.add_diagonal(m, row.count, sums.columns + row.column);
    } else {
      norms.add_row(m, row.count, sums.columns + row.column);
    }
    if (o.normalize_lr_cov) most = larger(most, largest_bits(m, row.count));
  }
  sums.rows = norms.rows;
  sums.squares = norms.all_squares();
  sums.largest = static_cast<double>(magnitude_of(most));
}

template <class T>
void momentum_rows(const FactorTask& task, const FactorTask& partner, const FactorOptions& o,
                   int64_t begin, int64_t end, MomentumSums& sums) {
  make_momentum_rows<T>(task, partner, o, begin, end, sums, [](int64_t) {});
}

// The momentum of a bordered factor from H and Pi(K^T K). scratch: border wide + border^2, of which
// the second part ends as sums.columns.
template <class T>
void border_momenta(FactorTask& task, const FactorTask& partner, const FactorOptions& o,
                    MomentumSums& sums, T* scratch) {
  const MomentumTerms terms(task, partner, o);
  const Border<T> b(task.layout);
  const auto add_up = task.layout.transposed ? column_border_sum<T> : row_border_sum<T>;
  add_up(task, static_cast<T>(terms.h), static_cast<T>(terms.gram), scratch);
  task.is_added_up = true;
  sums.columns = reinterpret_cast<double*>(scratch + b.border * b.wide);
  make_momentum_rows<T>(task, partner, o, 0, storage_rows(task.layout), sums, [&](int64_t i) {
    if (i < b.border) b.store_weighted(scratch, i, Numbers<T>(task).h);
  });
}

// beta1 for a momentum with this norm and this largest entry: normalised if asked for, and such
// that beta1 ||m|| <= step_cap.
SINGD_INLINE void set_step_size(FactorTask& task, double norm, double largest,
                                const FactorOptions& o) {
  task.momentum_norm = norm;
  const double beta = o.normalize_lr_cov ? o.lr_cov / larger(1.0, largest) : o.lr_cov;
  task.capped = beta * norm > o.step_cap;
  task.beta1 = task.capped ? o.step_cap / norm : beta;
}

// Parts are added in their order: the same sums whichever threads made them.
void momentum_step_size(FactorTask& task, const MomentumSums* parts, int64_t count,
                        const FactorOptions& o) {
  Norms norms;
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    norms.rows = larger(norms.rows, parts[i].rows);
    norms.squares += parts[i].squares;
    largest = larger(largest, parts[i].largest);
  }
  double* columns = parts[0].columns;
  for (int64_t i = 1; i < count; ++i) {
    for (int64_t j = 0; j < task.layout.dim; ++j) columns[j] += parts[i].columns[j];
  }
  norms.add_columns(columns, task.layout.dim);
  set_step_size(task, norms.bound(), largest, o);
}
