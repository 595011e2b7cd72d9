// update_factors_ for block-diagonal factors. Rows of blocks are padded to whole vectors in the
// workspace, so that little here has a remainder. H = K^T (U K) is needed in the momentum alone and
// its trace is the sum of the entries of K times those of U K: U K is kept instead of H, and one
// product by K^T makes the momentum
//
//   m = s (K^T (h_scale U K + gram_scale K) - I) + alpha1 m

// Rows of `size` numbers to rows `stride` apart, with zeros between. Readable behind the last row.
template <class T>
SINGD_INLINE void pad_rows(const T* from, int64_t size, int64_t stride, T* to) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < stride; j += kLanes<T>) {
      store<T>(to + i * stride + j, load<T>(from + i * size + j));
    }
    for (int64_t j = size; j < stride; ++j) to[i * stride + j] = T(0);
  }
}

// The block of a stored array from slot `at`, padded. scratch: size^2 + kPadding.
template <class T>
void load_block(const Array& array, int64_t at, int64_t size, T* to, T* scratch) {
  with_type(ConstArray{array.data, array.type},
            [&](const auto* stored) { load_row(stored + at, size * size, T(1), scratch); });
  for (int64_t i = 0; i < kPadding; ++i) scratch[size * size + i] = T(0);
  pad_rows(scratch, size, padded(size), to);
}

template <class T>
void block_curvature(FactorTask& task, const T* u, T* scratch) {
  const Numbers<T> n(task);
  double h = 0, gram = 0;
  for_each_block(task.layout, [&](int64_t, int64_t size, int64_t at, int64_t to) {
    const int64_t stride = padded(size);
    T *k = n.k + to, *uk = n.h + to;
    load_block(task.factor, at, size, k, scratch);
    multiply<T>(size, stride, size, {u + at, size, 1}, k, stride, uk, stride, kOverwrite<T>);
    h += static_cast<double>(dot_product(k, uk, size * stride));
    gram += static_cast<double>(dot_product(k, k, size * stride));
  });
  task.mean_trace_h = h * task.scale / static_cast<double>(task.layout.dim);
  task.mean_trace_gram = gram / static_cast<double>(task.layout.dim);
}

template <class T>
void add_old_block(const FactorTask& task, double alpha1, int64_t at, int64_t size, T* m,
                   T* scratch) {
  const int64_t area = size * padded(size);
  load_block(task.momentum, at, size, scratch, scratch + area);
#pragma GCC ivdep
  for (int64_t i = 0; i < area; ++i) {
    m[i] += static_cast<T>(alpha1 * static_cast<double>(scratch[i]));
  }
}

// The new momentum in the place of U K, its norms and its largest entry.
template <class T>
Norms block_momenta(const FactorTask& task, const FactorTask& partner, const FactorOptions& o,
                    double* largest, T* scratch) {
  const Numbers<T> n(task);
  const double s = o.momentum_scale();
  const double h_scale = s * task.scale * (o.kfac_like ? 1.0 : partner.mean_trace_h);
  const double gram_scale = s * o.damping * (o.kfac_like ? 1.0 : partner.mean_trace_gram);
  Norms norms;
  auto most = magnitude_bits(T(0));
  for_each_block(task.layout, [&](int64_t, int64_t size, int64_t at, int64_t to) {
    const int64_t stride = padded(size), area = size * stride;
    T *k = n.k + to, *m = n.h + to;
#pragma GCC ivdep
    for (int64_t i = 0; i < area; ++i) {
      scratch[i] = static_cast<T>(h_scale * static_cast<double>(m[i]) +
                                  gram_scale * static_cast<double>(k[i]));
    }
    multiply<T>(size, stride, size, {k, 1, stride}, scratch, stride, m, stride, kOverwrite<T>);
    for (int64_t i = 0; i < size; ++i) m[i * (stride + 1)] -= static_cast<T>(s);
    if (task.momentum.data != nullptr) add_old_block(task, o.alpha1, at, size, m, scratch);
    double* column_sums = reinterpret_cast<double*>(scratch);
    for (int64_t j = 0; j < stride; ++j) column_sums[j] = 0;
    for (int64_t i = 0; i < size; ++i) norms.add_row(m + i * stride, stride, column_sums);
    norms.add_columns(column_sums, stride);
    if (o.normalize_lr_cov) most = larger(most, largest_bits(m, area));
  });
  *largest = static_cast<double>(magnitude_of(most));
  return norms;
}

// Padded rows, plus those of `add` where given, to slots from `at`; whether all are finite. A row
// is written a whole number of vectors wide, over the beginning of the next one, which is written
// after it; there is room behind the last.
template <class T>
bool store_block(const T* from, const T* add, int64_t at, int64_t size, const Array& array,
                 const RoundingKey& key) {
  const int64_t stride = padded(size);
  bool finite = true;
  with_type(array, [&](auto* stored) {
    using Stored = typename Pointee<decltype(stored)>::type;
    for (int64_t i = 0; i < size; ++i) {
      const T* row = from + i * stride;
      const T* other = add != nullptr ? add + i * stride : row;
      const int64_t slot = at + i * size;
      Stored* to = stored + slot;
      const auto value = [&](int64_t j) { return add != nullptr ? row[j] + other[j] : row[j]; };
      if (key.enabled) {
        for (int64_t j = 0; j < size; ++j) to[j] = Stochastic<Stored>::of(value(j), key, slot + j);
      } else {
#pragma GCC ivdep
        for (int64_t j = 0; j < stride; ++j) to[j] = Narrow<Stored>::of(value(j));
      }
    }
    finite = are_finite<T>(stored + at, size * size);
  });
  return finite;
}

// scratch: 2 size padded(size) + kPadding, here and above.
template <class T>
void block_candidate(FactorTask& task, const FactorTask& partner, const FactorOptions& o,
                     T* scratch) {
  const Numbers<T> n(task);
  double largest = 0;
  const double bound = block_momenta<T>(task, partner, o, &largest, scratch).bound();
  const double beta = step_size(task, bound, largest, o);
  const RoundingKey key = task.key.stream(0), momentum_key = task.key.stream(1);
  task.finite = true;
  for_each_block(task.layout, [&](int64_t, int64_t size, int64_t at, int64_t to) {
    const int64_t stride = padded(size), area = size * stride;
    const T *k = n.k + to, *m = n.h + to;
    T *e = scratch, *product = scratch + area;
    copy_scaled(m, area, -beta, e);
    if (o.expm_order == 2) {
      multiply<T>(size, stride, size, {e, stride, 1}, e, stride, product, stride, kOverwrite<T>);
      for (int64_t i = 0; i < area; ++i) e[i] += product[i] / 2;
    }
    multiply<T>(size, stride, size, {k, stride, 1}, e, stride, product, stride, kOverwrite<T>);
    task.finite &= store_block<T>(product, k, at, size, task.next_factor, key);
    task.finite &= store_block<T>(m, nullptr, at, size, task.next_momentum, momentum_key);
  });
}
