// The kernels of update_factors_, for every family.

template <class T>
void factor_curvature(FactorTask& task, void* memory) {
  const Numbers<T> n(task);
  T* scratch = static_cast<T*>(memory);
  const T* u = static_cast<const T*>(task.statistic.data);
  if (task.layout.family == Family::kBlockDiagonal) return block_curvature(task, u);
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
  task.mean_trace_h = mean_diagonal(task.layout, n.h) * task.scale;
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
  MomentumSums sums;
  sums.columns = static_cast<double*>(memory);
  momentum_rows<T>(task, partner, o, 0, storage_rows(task.layout), sums);
  const double beta = momentum_step_size(task, &sums, 1, o);
  const bool second_order = o.expm_order == 2;
  task.finite = task.layout.family == Family::kDiagonal
                    ? diagonal_candidate<T>(task, beta, second_order)
                    : border_candidate<T>(task, beta, second_order, scratch);
  const RoundingKey key = task.key.stream(1);
  task.finite &= store_numbers(n.h, task.size, task.next_momentum, key);
}

template <class T>
void copy_numbers(ConstArray from, double scale, int64_t begin, int64_t end, const Array& to) {
  SINGD_COUNT(elements, end - begin);
  T chunk[kChunk];
  with_type(from, [&](const auto* source) {
    with_type(to, [&](auto* target) {
      for (int64_t first = begin; first < end; first += kChunk) {
        const int64_t count = smaller(kChunk, end - first);
        load_row(source + first, count, static_cast<T>(scale), chunk);
        narrow_row(chunk, count, RoundingKey{}, first, target + first);
      }
    });
  });
}

template <class T>
bool check_candidates(const FactorTask& task, int64_t begin, int64_t end) {
  return whole_candidates<T>(task, begin, end, false);
}

template <class T>
void commit_candidates(const FactorTask& task, int64_t begin, int64_t end) {
  whole_candidates<T>(task, begin, end, true);
}

template <class T>
constexpr FactorKernels factor_kernels() {
  return {factor_curvature<T>, factor_candidate<T>, momentum_rows<T>,    momentum_step_size,
          copy_numbers<T>,     check_candidates<T>, commit_candidates<T>};
}
