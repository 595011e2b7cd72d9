// The candidates of a factor and its momentum in update_factors_, in the types that they are stored
// in.

// ---- Stores ----

// What becomes of candidates: they take the place of the state, or are only looked at, whether they
// are finite as they would be stored. One function for both, since a candidate must round the same
// way twice.
template <class T>
struct Candidates {
  Array state;  // its data are null, if momenta are not kept
  RoundingKey key;
  bool commit;
  bool finite = true;

  // f(numbers of the state), unless momenta are to be written that are not kept.
  template <class Function>
  SINGD_INLINE void visit(Function f) {
    with_type(state, [&](auto* stored) {
      if (!commit || stored != nullptr) f(stored);
    });
  }

  // Numbers from slot `first` on, at most kChunk of them.
  SINGD_INLINE void take(const T* values, int64_t first, int64_t count) {
    visit([&](auto* stored) {
      typename Pointee<decltype(stored)>::type chunk[kChunk];
      auto* to = commit ? stored + first : chunk;
      narrow_row(values, count, key, first, to);
      if (!commit) finite &= are_finite<T>(to, count);
    });
  }

  // However many.
  SINGD_INLINE void take_all(const T* values, int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; j += kChunk) {
      take(values + j, first + j, smaller(kChunk, count - j));
    }
  }
};

template <class T>
SINGD_INLINE Candidates<T> factor_candidates(const FactorTask& task, bool commit) {
  return {task.factor, task.key.stream(0), commit};
}
template <class T>
SINGD_INLINE Candidates<T> momentum_candidates(const FactorTask& task, bool commit) {
  const bool kept = task.momentum.data != nullptr;
  return {
      {task.momentum.data, (kept ? task.momentum : task.factor).type}, task.key.stream(1), commit};
}

// The candidates of slots [begin, end), from the new momentum and the update of K.
template <class T>
bool whole_candidates(const FactorTask& task, int64_t begin, int64_t end, bool commit) {
  SINGD_COUNT(elements, end - begin);
  const T scale = static_cast<T>(task.update_scale);
  T old[kChunk], update[kChunk], next[kChunk], moved[kChunk];
  auto factor = factor_candidates<T>(task, commit);
  auto momentum = momentum_candidates<T>(task, commit);
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = smaller(kChunk, end - first);
    const T* k = numbers_of(task.factor, first, count, old);
    const T* ke = numbers_of(task.gram, first, count, update);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) next[j] = k[j] + scale * ke[j];
    factor.take(next, first, count);
    momentum.take(numbers_of(task.new_momentum, first, count, moved), first, count);
  }
  return factor.finite && momentum.finite;
}

// ---- K + K E with E = Expm(-beta m) - I, truncated: E without the identity, whose rounding would
// be that of K itself ----

template <class T>
void diagonal_candidates(const FactorTask& task, bool second_order, Candidates<T>& factor) {
  const Numbers<T> n(task);
  const T scale = static_cast<T>(-task.beta1);
  T chunk[kChunk];
  for (int64_t first = 0; first < task.size; first += kChunk) {
    const int64_t count = smaller(kChunk, task.size - first);
    const T *k = n.k + first, *m = n.h + first;
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      T e = scale * m[j];
      if (second_order) e += e * e / 2;
      chunk[j] = k[j] + k[j] * e;
    }
    factor.take(chunk, first, count);
  }
}

// The same for a bordered factor. scratch: border wide + border^2 + wide.
template <class T>
void border_candidates(const FactorTask& task, bool second_order, Candidates<T>& factor,
                       T* scratch) {
  const Numbers<T> n(task);
  const Border<T> b(task.layout);
  const int64_t first_diagonal = b.border * b.d;
  const T* e = n.h;  // E = scale e
  T scale = static_cast<T>(-task.beta1);
  if (second_order) {
    b.multiply_rows(n.h, n.h, scale, scratch,
                    [&](int64_t r, int64_t begin, int64_t end, const T* x, const T* m, const T* s) {
                      T* to = n.gram + r * b.d;
#pragma GCC ivdep
                      for (int64_t j = begin; j < end; ++j) {
                        to[j] = scale * m[j] + scale * (x[j] + m[j] * s[j]) / 2;
                      }
                    });
    for (int64_t j = first_diagonal; j < task.size; ++j) {
      const T x = scale * n.h[j];
      n.gram[j] = x + x * x / 2;
    }
    e = n.gram;
    scale = T(1);
  }
  const bool swap = task.layout.transposed;  // (K E)^T = E^T K^T
  T chunk[kChunk];
  b.multiply_rows(swap ? e : n.k, swap ? n.k : e, scale, scratch,
                  [&](int64_t r, int64_t begin, int64_t end, const T* x, const T* y, const T* s) {
                    const T* k = n.k + r * b.d;
#pragma GCC ivdep
                    for (int64_t j = begin; j < end; ++j) {
                      chunk[j - begin] = k[j] + (x[j] + y[j] * s[j]);
                    }
                    factor.take(chunk, r * b.d + begin, end - begin);
                  });
  for (int64_t first = first_diagonal; first < task.size; first += kChunk) {
    const int64_t count = smaller(kChunk, task.size - first);
    const T *k = n.k + first, *diagonal = e + first;
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) chunk[j] = k[j] + k[j] * (scale * diagonal[j]);
    factor.take(chunk, first, count);
  }
}
