// The candidates of a factor and its momentum in update_factors_, in the types that they are stored
// in.

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

// `count` numbers to the beginning of an array; whether all are finite.
template <class T>
bool store_numbers(const T* values, int64_t count, const Array& array, const RoundingKey& key) {
  bool finite = true;
  with_type(array, [&](auto* to) {
    const bool there = static_cast<const void*>(to) == static_cast<const void*>(values);
    if (!there) narrow_row(values, count, key, 0, to);
    finite = are_finite<T>(to, count);
  });
  return finite;
}

// to = a + scale b.
template <class T>
SINGD_INLINE void add_scaled(const T* a, T scale, const T* b, int64_t count, T* to) {
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) to[j] = a[j] + scale * b[j];
}

// The candidates of slots [begin, end) as they are stored: to the state, or only looked at, whether
// they are finite. One function for both, since a candidate must round the same way twice.
template <class T>
bool whole_candidates(const FactorTask& task, int64_t begin, int64_t end, bool commit) {
  SINGD_COUNT(elements, end - begin);
  const T* m = static_cast<const T*>(task.h);
  const T scale = static_cast<T>(task.update_scale);
  Array momentum = task.momentum;
  if (momentum.data == nullptr) momentum.type = task.factor.type;
  T old[kChunk], update[kChunk], next[kChunk];
  bool finite = true;
  const auto settle = [&](const T* values, int64_t first, int64_t count, const Array& array,
                          const RoundingKey& key) {
    with_type(array, [&](auto* state) {
      if (commit && state == nullptr) return;  // momenta are not kept
      typename Pointee<decltype(state)>::type chunk[kChunk];
      auto* to = commit ? state + first : chunk;
      narrow_row(values, count, key, first, to);
      if (!commit) finite &= are_finite<T>(to, count);
    });
  };
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = smaller(kChunk, end - first);
    const T* k = numbers_of(task.factor, first, count, old);
    const T* ke = numbers_of(task.gram, first, count, update);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) next[j] = k[j] + scale * ke[j];
    settle(next, first, count, task.factor, task.key.stream(0));
    settle(m + first, first, count, momentum, task.key.stream(1));
  }
  return finite;
}

// ---- K + K E with E = Expm(-beta m) - I, truncated: E without the identity, whose rounding would
// be that of K itself ----

template <class T>
bool diagonal_candidate(const FactorTask& task, double beta, bool second_order) {
  const Numbers<T> n(task);
  for (int64_t j = 0; j < task.size; ++j) {
    T e = static_cast<T>(-beta) * n.h[j];
    if (second_order) e += e * e / 2;
    n.gram[j] = n.k[j] + n.k[j] * e;
  }
  return store_numbers(n.gram, task.size, task.next_factor, task.key.stream(0));
}

// The same for a bordered factor. scratch: border wide + border^2 + wide.
template <class T>
bool border_candidate(const FactorTask& task, double beta, bool second_order, T* scratch) {
  const Numbers<T> n(task);
  const Border<T> b(task.layout);
  const T scale = static_cast<T>(-beta), *m = n.h;
  T *rows = scratch, *rest = scratch + b.border * b.wide;
  if (second_order) {
    b.multiply_rows(m, m, rows, rest);
    for (int64_t r = 0; r < b.border; ++r) {
      add_scaled(m + r * b.d, scale / 2, rows + r * b.wide, b.d, n.gram + r * b.d);
    }
    for (int64_t j = b.border * b.d; j < task.size; ++j) n.gram[j] = m[j] + scale / 2 * m[j] * m[j];
    m = n.gram;
  }
  const bool swap = task.layout.transposed;  // (K m)^T = m^T K^T
  b.multiply_rows(swap ? m : n.k, swap ? n.k : m, rows, rest);
  const RoundingKey key = task.key.stream(0);
  bool finite = true;
  with_type(task.next_factor, [&](auto* to) {
    const auto store = [&](const T* product, int64_t first, int64_t count) {
      add_scaled(n.k + first, scale, product, count, rest);
      narrow_row(rest, count, key, first, to + first);
      finite &= are_finite<T>(to + first, count);
    };
    for (int64_t r = 0; r < b.border; ++r) store(rows + r * b.wide, r * b.d, b.d);
    const T *k = b.diagonal(n.k), *diagonal = b.diagonal(m);
    for (int64_t j = 0; j < b.interior(); ++j) rows[j] = k[j] * diagonal[j];
    store(rows, b.border * b.d, b.interior());
  });
  return finite;
}
