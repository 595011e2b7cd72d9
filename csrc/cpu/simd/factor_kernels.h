// The kernels of update_factors_, for every family.

template <class T>
void factor_curvature(FactorTask& task, void* memory) {
  const Numbers<T> n(task);
  T* scratch = static_cast<T*>(memory);
  const T* u = static_cast<const T*>(task.statistic.data);
  if (task.layout.family == Family::kBlockDiagonal) return block_curvature(task, u, scratch);
  with_type(ConstArray{task.factor.data, task.factor.type},
            [&](const auto* stored) { load_row(stored, task.size, T(1), n.k); });
  for (int64_t i = 0; i < kPadding; ++i) n.k[task.size + i] = n.gram[task.size + i] = T(0);
  if (task.layout.family == Family::kDiagonal) {
    diagonal_curvature(task, u);
  } else if (task.layout.transposed) {
    column_border_curvature(task, u, scratch);
  } else {
    row_border_curvature(task, u, scratch);
  }
  task.mean_trace_h = mean_diagonal(task.layout, n.h);
  task.mean_trace_gram = mean_diagonal(task.layout, n.gram);
}

template <class T>
void factor_candidate(FactorTask& task, const FactorTask& partner, const FactorOptions& o,
                      void* memory) {
  const Numbers<T> n(task);
  T* scratch = static_cast<T*>(memory);
  if (task.layout.family == Family::kBlockDiagonal) {
    return block_candidate<T>(task, partner, o, scratch);
  }
  momentum_range<T>(task, partner, o, 0, task.size);
  const double s = o.momentum_scale();
  for_each_diagonal(task.layout, [&](int64_t slot) { n.h[slot] -= static_cast<T>(s); });
  add_old_momentum<T>(task, o, 0, task.size);
  const double bound = norm_bound(task.layout, n.h, static_cast<double*>(memory));
  const auto largest = o.normalize_lr_cov ? largest_bits(n.h, task.size) : magnitude_bits(T(0));
  const double beta = step_size(task, bound, static_cast<double>(magnitude_of(largest)), o);
  const bool second_order = o.expm_order == 2;
  task.finite = task.layout.family == Family::kDiagonal
                    ? diagonal_candidate<T>(task, beta, second_order)
                    : border_candidate<T>(task, beta, second_order, scratch);
  const RoundingKey key = task.key.stream(1);
  task.finite &= store_numbers<T>(n.h, nullptr, 0, task.size, task.next_momentum, key);
}

template <class T>
void load_factor(const FactorTask& task, int64_t begin, int64_t end) {
  T* k = static_cast<T*>(task.k);
  with_type(ConstArray{task.factor.data, task.factor.type},
            [&](const auto* stored) { load_row(stored + begin, end - begin, T(1), k + begin); });
}

template <class T>
double norm_of(const Layout& layout, const void* numbers, double* scratch) {
  return norm_bound(layout, static_cast<const T*>(numbers), scratch);
}

template <class T>
bool store_range(const void* values, const void* old, int64_t begin, int64_t end, const Array& to,
                 const RoundingKey& key) {
  return store_numbers(static_cast<const T*>(values), static_cast<const T*>(old), begin, end, to,
                       key);
}

template <class T>
constexpr FactorKernels factor_kernels() {
  return {factor_curvature<T>, factor_candidate<T>, load_factor<T>, momentum_range<T>,
          add_old_momentum<T>, norm_of<T>,          store_range<T>};
}
