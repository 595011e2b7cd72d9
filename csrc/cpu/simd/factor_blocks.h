// update_factors_ for block-diagonal factors. Rows of blocks are padded to whole vectors in the
// workspace, so that little here has a remainder. H = K^T (U K) is needed in the momentum alone and
// its trace is the sum of the entries of K times those of U K: U K is kept instead of H, and one
// product by K^T makes the momentum
//
//   m = s (K^T (h_scale U K + gram_scale K) - I) + alpha1 m
//
// and the next K is K + K E with E = -beta1 m + (beta1 m)^2 / 2, the square only with expm_order 2.

// The block of a stored array from slot `at`, times `scale`, in padded rows. These are read a whole
// number of vectors wide, but where that would be behind the array.
template <class T>
void load_block(const Array& array, int64_t numbers, int64_t at, int64_t size, T scale, T* to) {
  const int64_t stride = padded(size);
  with_type(ConstArray{array.data, array.type}, [&](const auto* stored) {
    for (int64_t i = 0; i < size; ++i, at += size, to += stride) {
      load_row(stored + at, smaller(stride, numbers - at), scale, to);
      for (int64_t j = size; j < stride; ++j) to[j] = T(0);
    }
  });
}

// What the tiles of large blocks' products ask for: an array of the factor's, some blocks ahead.
// The first blocks are asked for here; more of them would be waited for.
SINGD_INLINE AskedRows asked_blocks(const FactorTask& task, const ConstArray& array) {
  constexpr int64_t kAhead = 4;
  const int64_t size = task.layout.block, tiles = (size + kBlockTileRows - 1) / kBlockTileRows;
  if (array.data == nullptr || !tiles_ask(task.layout)) return {};
  const char* data = static_cast<const char*>(array.data);
  const int64_t bytes = task.size * size_of(array.type), block = size * size * size_of(array.type);
  const int64_t begin = smaller(bytes, kAhead * block);
  for (int64_t at = 0; at < begin; at += kLineBytes) __builtin_prefetch(data + at, 0, 2);
  return {data + begin, begin < bytes, bytes - begin, 0, block / kLineBytes / tiles + 1};
}

template <class T>
void block_curvature(FactorTask& task, const T* u) {
  Ahead ahead{asked_blocks(task, {task.factor.data, task.factor.type}),
              asked_blocks(task, task.statistic)};
  const Numbers<T> n(task);
  double h = 0, gram = 0;
  for_each_block(task.layout, [&](int64_t, int64_t size, int64_t at, int64_t to) {
    const int64_t stride = padded(size);
    T *k = n.k + to, *uk = n.h + to;
    load_block(task.factor, task.size, at, size, T(1), k);
    multiply<T>(size, stride, size, {u + at, size, 1}, k, stride, uk, stride, kOverwrite<T>,
                &ahead);
    h += static_cast<double>(dot_product(k, uk, size * stride));
    gram += static_cast<double>(dot_product(k, k, size * stride));
  });
  task.mean_trace_h = h * task.scale / static_cast<double>(task.layout.dim);
  task.mean_trace_gram = gram / static_cast<double>(task.layout.dim);
}

// alpha1 m - s I of a block, in the place of its U K.
template <class T>
void load_old_momentum(const FactorTask& task, const FactorOptions& o, int64_t at, int64_t size,
                       T* m) {
  const int64_t stride = padded(size);
  if (task.momentum.data != nullptr) {
    load_block(task.momentum, task.size, at, size, static_cast<T>(o.alpha1), m);
  } else {
    for (int64_t i = 0; i < size * stride; ++i) m[i] = T(0);
  }
  for (int64_t i = 0; i < size; ++i) m[i * (stride + 1)] -= static_cast<T>(o.momentum_scale());
}

// The new momentum in the place of U K, its norms and its largest entry.
template <class T>
Norms block_momenta(const FactorTask& task, const FactorTask& partner, const FactorOptions& o,
                    double* largest, T* scratch) {
  const Numbers<T> n(task);
  const MomentumTerms terms(task, partner, o);
  const T h_scale = static_cast<T>(terms.h), gram_scale = static_cast<T>(terms.gram);
  Norms norms;
  Ahead ahead{asked_blocks(task, {task.momentum.data, task.momentum.type}), {}};
  auto most = magnitude_bits(T(0));
  for_each_block(task.layout, [&](int64_t, int64_t size, int64_t at, int64_t to) {
    const int64_t stride = padded(size), area = size * stride;
    T *k = n.k + to, *m = n.h + to;
#pragma GCC ivdep
    for (int64_t i = 0; i < area; ++i) scratch[i] = h_scale * m[i] + gram_scale * k[i];
    load_old_momentum(task, o, at, size, m);
    multiply<T>(size, stride, size, {k, 1, stride}, scratch, stride, m, stride, kAdd<T>, &ahead);
    norms.add_block(m, size, stride);
    if (o.normalize_lr_cov) most = larger(most, largest_bits(m, area));
  });
  *largest = static_cast<double>(magnitude_of(most));
  return norms;
}

// Padded rows times `scale`, plus those of `add` where given, as candidates from slot `at`. A row
// is written a whole number of vectors wide, over the beginning of the next one, which is written
// after it, but for the last of the `numbers`.
template <class T>
void take_block(const T* from, T scale, const T* add, int64_t at, int64_t size, int64_t numbers,
                Candidates<T>& candidates) {
  const int64_t stride = padded(size);
  const RoundingKey& key = candidates.key;
  candidates.visit([&](auto* stored) {
    using Stored = typename Pointee<decltype(stored)>::type;
    Stored looked_at[kChunk];
    for (int64_t i = 0; i < size; ++i) {
      const T* row = from + i * stride;
      const T* other = add != nullptr ? add + i * stride : row;
      const int64_t slot = at + i * size;
      Stored* to = candidates.commit ? stored + slot : looked_at;
      const auto value = [&](int64_t j) {
        return add != nullptr ? other[j] + scale * row[j] : row[j];
      };
      if (key.enabled) {
        for (int64_t j = 0; j < size; ++j) to[j] = Stochastic<Stored>::of(value(j), key, slot + j);
      } else {
        const int64_t count = smaller(stride, numbers - slot);
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) to[j] = Narrow<Stored>::of(value(j));
      }
      if (!candidates.commit) candidates.finite &= are_finite<T>(to, size);
    }
  });
}

// The new momentum in the place of U K, and beta1. scratch: size padded(size), here and above.
template <class T>
void block_momentum(FactorTask& task, const FactorTask& partner, const FactorOptions& o,
                    T* scratch) {
  double largest = 0;
  const double bound = block_momenta<T>(task, partner, o, &largest, scratch).bound();
  set_step_size(task, bound, largest, o);
}

// scratch: 2 size padded(size) + kPadding.
template <class T>
void block_candidates(const FactorTask& task, bool second_order, Candidates<T>& factor,
                      Candidates<T>& momentum, T* scratch) {
  const Numbers<T> n(task);
  for_each_block(task.layout, [&](int64_t, int64_t size, int64_t at, int64_t to) {
    const int64_t stride = padded(size), area = size * stride;
    const T *k = n.k + to, *m = n.h + to;
    T *product = scratch + area, scale = static_cast<T>(-task.beta1);
    const T* e = m;  // E = scale e
    if (second_order) {
      for (int64_t i = 0; i < area; ++i) scratch[i] = scale * m[i];
      multiply<T>(size, stride, size, {scratch, stride, 1}, scratch, stride, product, stride,
                  kOverwrite<T>);
      for (int64_t i = 0; i < area; ++i) scratch[i] += product[i] / 2;
      e = scratch;
      scale = T(1);
    }
    multiply<T>(size, stride, size, {k, stride, 1}, e, stride, product, stride, kOverwrite<T>);
    take_block<T>(product, scale, k, at, size, task.size, factor);
    take_block<T>(m, T(1), nullptr, at, size, task.size, momentum);
  });
}
