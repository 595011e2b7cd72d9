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
    narrow_row(values, count, key, 0, to);
    finite = are_finite<T>(to, count);
  });
  return finite;
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
  copy_scaled(n.h, task.size, static_cast<T>(-beta), e);
  if (second_order) {
    multiply_borders(b, e, e, product, rest);
    for (int64_t i = 0; i < task.size; ++i) e[i] += product[i] / 2;
  }
  const bool swap = task.layout.transposed;  // (K E)^T = E^T K^T
  multiply_borders(b, swap ? e : n.k, swap ? n.k : e, product, rest);
  for (int64_t i = 0; i < task.size; ++i) product[i] += n.k[i];
  return store_numbers(product, task.size, task.next_factor, task.key.stream(0));
}
