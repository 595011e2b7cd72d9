// The kernels of update_factors_, for every family.

// Asks for all that the update of a factor reads, side by side. Inlined, since GCC takes a function
// that only asks for one without effects, and drops its call.
SINGD_INLINE void ask_for_factor(const FactorTask& task) {
  const ConstArray arrays[] = {{task.factor.data, task.factor.type},
                               task.statistic,
                               {task.momentum.data, task.momentum.type}};
  const char* lines[3];
  int64_t left[3];
  for (int i = 0; i < 3; ++i) {
    lines[i] = static_cast<const char*>(arrays[i].data);
    left[i] = lines[i] == nullptr ? 0 : task.size * size_of(arrays[i].type);
  }
  while (left[0] > 0 || left[1] > 0 || left[2] > 0) {
    for (int i = 0; i < 3; ++i) {
      if (left[i] > 0) __builtin_prefetch(lines[i], 0, 2);
      lines[i] += kLineBytes;
      left[i] -= kLineBytes;
    }
  }
}

template <class T>
void factor_curvature(FactorTask& task, void* memory) {
  const Numbers<T> n(task);
  T* scratch = static_cast<T*>(memory);
  const T* u = static_cast<const T*>(task.statistic.data);
  const bool blocks = task.layout.family == Family::kBlockDiagonal;
  if (!tiles_ask(task.layout)) ask_for_factor(task);
  if (blocks) return block_curvature(task, u);
  with_type(ConstArray{task.factor.data, task.factor.type},
            [&](const auto* stored) { load_row(stored, task.size, T(1), n.k); });
  for (int64_t i = 0; i < kPadding; ++i) n.k[task.size + i] = n.gram[task.size + i] = T(0);
  if (task.layout.family == Family::kDiagonal) return diagonal_curvature(task, u);
  if (task.layout.transposed) return column_border_curvature(task, u, scratch);
  row_border_curvature(task, u, scratch);
}

template <class T>
void local_momentum(FactorTask& task, const FactorTask& partner, const FactorOptions& o,
                    void* memory) {
  T* scratch = static_cast<T*>(memory);
  const Family family = task.layout.family;
  if (family == Family::kBlockDiagonal) return block_momentum(task, partner, o, scratch);
  MomentumSums sums;
  if (family == Family::kDiagonal) {
    sums.columns = static_cast<double*>(memory);
    momentum_rows<T>(task, partner, o, 0, storage_rows(task.layout), sums);
  } else {
    border_momenta<T>(task, partner, o, sums, scratch);
  }
  momentum_step_size(task, &sums, 1, o);
}

template <class T>
bool local_candidates(const FactorTask& task, const FactorOptions& o, bool commit, void* memory) {
  T* scratch = static_cast<T*>(memory);
  const bool second_order = o.expm_order == 2;
  auto factor = factor_candidates<T>(task, commit);
  auto momentum = momentum_candidates<T>(task, commit);
  if (task.layout.family == Family::kBlockDiagonal) {
    block_candidates(task, second_order, factor, momentum, scratch);
  } else {
    if (task.layout.family == Family::kDiagonal) {
      diagonal_candidates(task, second_order, factor);
    } else {
      border_candidates(task, second_order, factor, scratch);
    }
    momentum.take_all(Numbers<T>(task).h, 0, task.size);
  }
  return factor.finite && momentum.finite;
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
  return {factor_curvature<T>, local_momentum<T>, local_candidates<T>, momentum_rows<T>,
          momentum_step_size,  copy_numbers<T>,   check_candidates<T>, commit_candidates<T>};
}
