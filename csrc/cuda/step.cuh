// What the kernels of preconditioned_update_ share: elements of a layer by position in
// W = [weight, bias], magnitudes as integers, tiles, and the write of M and W.
#pragma once

#include "launch.cuh"
#include "numeric.cuh"
#include "preconditioned_update.h"
#include "table.cuh"

namespace singd::cuda {

constexpr int kStepThreads = 256;
// Blocks of a multiprocessor of the kernels that keep many sums in registers: as many as fit.
template <class T>
constexpr int kResidentBlocks = sizeof(T) == 8 ? 1 : 2;

// An element type that is known only at run time.
struct AnyElement {};

// Computes in T; W is stored as Stored, kCount elements of which move at a time.
template <class T, class Stored_>
struct Elements {
  using Compute = T;
  using Stored = Stored_;
  static constexpr int kCount = kVector<Stored_>;
};
template <class T>
struct Elements<T, AnyElement> {
  using Compute = T;
  using Stored = AnyElement;
  static constexpr int kCount = 1;
};

// Host: f(Elements<...>) for the kind of a launch.
template <class Function>
void dispatch(const StepKind& kind, Function&& f) {
  if (!kind.in_vectors) {
    return kind.compute == Dtype::kFloat64 ? f(Elements<double, AnyElement>{})
                                           : f(Elements<float, AnyElement>{});
  }
  switch (kind.element) {
    case Dtype::kFloat64:
      return f(Elements<double, double>{});
    case Dtype::kFloat32:
      return f(Elements<float, float>{});
    case Dtype::kBFloat16:
      return f(Elements<float, bfloat16>{});
    default:
      return f(Elements<float, float16>{});
  }
}

// Host: the same for float32 and 16-bit layers that move in vectors.
template <class Function>
void dispatch_vectors(const StepKind& kind, Function&& f) {
  if (kind.element == Dtype::kFloat32) return f(Elements<float, float>{});
  if (kind.element == Dtype::kBFloat16) return f(Elements<float, bfloat16>{});
  f(Elements<float, float16>{});
}

// Host: the items as a kernel's argument, after first_block of each is set from blocks(item).
// Returns the number of blocks.
template <class Item, int kCapacity, class Blocks>
int64_t fill(Table<Item, kCapacity>& table, Item* items, int count, Blocks&& blocks) {
  int64_t total = 0;
  table.count = count;
  for (int n = 0; n < count; ++n) {
    items[n].first_block = total;
    total += blocks(items[n]);
    table.items[n] = items[n];
  }
  return total;
}

// |value| as an int: ordered like the numbers, infinities beyond all of them, then NaN.
__device__ __forceinline__ int magnitude(float value) {
  int bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffff;
}
__device__ __forceinline__ int magnitude(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return static_cast<int>(bits >> 32) & 0x7fffffff;
}

// The largest magnitude of numbers as they are stored.
template <class Stored>
class LargestMagnitude {
 public:
  // A word of 16-bit numbers, or of a float32.
  __device__ __forceinline__ void add(uint32_t word) {
    if constexpr (sizeof(Stored) == 2) {
      largest_ = max_of_halves(largest_, word & 0x7fff7fffU);
    } else {
      largest_ = max(largest_, word & 0x7fffffffU);
    }
  }

  template <int N>
  __device__ __forceinline__ void add(const Vec<Stored, N>& numbers) {
    if constexpr (sizeof(Stored) == 8) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        largest_ = max(largest_, static_cast<uint32_t>(magnitude(numbers[n])));
      }
    } else {
      uint32_t words[N * sizeof(Stored) / 4];
      memcpy(words, &numbers, sizeof words);
#pragma unroll
      for (int n = 0; n < static_cast<int>(N * sizeof(Stored) / 4); ++n) add(words[n]);
    }
  }

  // As magnitude() of the largest.
  __device__ __forceinline__ int key() const {
    if constexpr (sizeof(Stored) == 2) {
      const auto bits = static_cast<uint16_t>(max(largest_ >> 16, largest_ & 0xffffU));
      Stored largest;
      memcpy(static_cast<void*>(&largest), &bits, sizeof largest);
      return magnitude(widen<float>(largest));
    } else {
      return static_cast<int>(largest_);
    }
  }

 private:
  uint32_t largest_ = 0;  // of 16-bit numbers those at even and at odd places
};

// The largest number of this magnitude.
template <class T>
__device__ __forceinline__ T from_magnitude(int key) {
  T value;
  if constexpr (sizeof(T) == 8) {
    const uint64_t rest = key < 0x7ff00000 ? 0xffffffffULL : 0;
    const uint64_t bits = static_cast<uint64_t>(key) << 32 | rest;
    memcpy(&value, &bits, sizeof value);
  } else {
    memcpy(&value, &key, sizeof value);
  }
  return value;
}

// *counter = max(*counter, key of any lane). All lanes of the warp take part.
__device__ __forceinline__ void raise(int* counter, int key) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(0xffffffffU, key, offset);
    key = other > key ? other : key;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(counter, key);
}

__device__ __forceinline__ int* counters_of(const StepArguments& a, const StepLayer& l) {
  return a.counters + static_cast<int64_t>(kCounters) * l.slot;
}

// Element `index` of an array of the launch's element type, or of the given one.
template <class E, Cache kCache = Cache::kNormal>
__device__ __forceinline__ typename E::Compute load_element(const void* p, int8_t dtype,
                                                            int64_t index) {
  using T = typename E::Compute;
  if constexpr (std::is_same_v<typename E::Stored, AnyElement>) {
    return load_as<T>(p, static_cast<Dtype>(dtype), index);
  } else {
    return widen<T>(load<kCache>(static_cast<const typename E::Stored*>(p) + index));
  }
}

template <class E>
__device__ __forceinline__ void store_element(void* p, int8_t dtype, int64_t index,
                                              typename E::Compute value, const RoundingKey& key) {
  if constexpr (std::is_same_v<typename E::Stored, AnyElement>) {
    store_as(p, static_cast<Dtype>(dtype), index, value, key);
  } else {
    using Stored = typename E::Stored;
    store(static_cast<Stored*>(p) + index, narrow<Stored>(value, key, index));
  }
}

// G[i, j] of the gradient of W = [weight, bias].
template <class E>
__device__ __forceinline__ typename E::Compute load_gradient(const StepLayer& l, int64_t i, int j) {
  if (j < l.weight_columns()) {
    return load_element<E>(l.gradient, l.gradient_dtype[0], i * l.gradient_pitch + j);
  }
  return load_element<E>(l.gradient_bias, l.gradient_dtype[1], i * l.gradient_bias_pitch);
}

// The columns [begin, end) of the vector of E::kCount columns that starts at column j.
struct Columns {
  int j, begin, end;
};

template <class E>
__device__ __forceinline__ bool is_vector(const StepLayer& l, const Columns& c) {
  return E::kCount > 1 && c.begin == 0 && c.end == E::kCount &&
         c.j + E::kCount <= l.weight_columns();
}

// Whether G[i, columns] is one aligned vector of the gradient.
template <class E>
__device__ __forceinline__ bool is_gradient_vector(const StepLayer& l, const Columns& c) {
  return l.gradient_in_vectors && is_vector<E>(l, c);
}

// G[i, columns] where it is one.
template <class E, Cache kCache = Cache::kNormal>
__device__ __forceinline__ auto gradient_vector(const StepLayer& l, int64_t i, const Columns& c) {
  const auto* row = static_cast<const typename E::Stored*>(l.gradient) + i * l.gradient_pitch;
  return load<kCache>(reinterpret_cast<const Vec<typename E::Stored, E::kCount>*>(row + c.j));
}

// G[i, columns]; 0 in the other columns of the vector.
template <class E, Cache kCache>
__device__ __forceinline__ void load_gradient(const StepLayer& l, int64_t i, const Columns& c,
                                              typename E::Compute (&g)[E::kCount]) {
  using T = typename E::Compute;
  if constexpr (E::kCount > 1) {
    if (is_gradient_vector<E>(l, c)) {
      const auto v = gradient_vector<E, kCache>(l, i, c);
#pragma unroll
      for (int e = 0; e < E::kCount; ++e) g[e] = widen<T>(v[e]);
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < E::kCount; ++e) {
    g[e] = e >= c.begin && e < c.end ? load_gradient<E>(l, i, c.j + e) : T(0);
  }
}

// A rectangle of W. `base` is its first column, rounded down to a vector.
struct Tile {
  int row, rows, column, columns, base;
};

template <class E>
__device__ __forceinline__ Tile tile_of(const StepLayer& l, int64_t number) {
  const int across = l.column_tiles();
  Tile t;
  t.row = static_cast<int>(number / across) * l.tile_rows;
  t.column = static_cast<int>(number % across) * l.tile_columns;
  t.rows = min(static_cast<int>(l.tile_rows), l.rows - t.row);
  t.columns = min(static_cast<int>(l.tile_columns), l.columns - t.column);
  t.base = t.column / E::kCount * E::kCount;
  return t;
}

// The vectors of a tile that a thread owns: the same columns in every row_stride-th row.
// Neighbouring threads have neighbouring vectors.
struct Share {
  Columns columns;
  int first_row, row_stride;
};

template <class E>
__device__ __forceinline__ Share share_of(const Tile& t) {
  const int end = t.column + t.columns;
  const int vectors = (end - t.base + E::kCount - 1) / E::kCount;  // at most kStepThreads
  const int row = threadIdx.x / vectors, stride = kStepThreads / vectors;
  const int j = t.base + (static_cast<int>(threadIdx.x) - row * vectors) * E::kCount;
  const Columns columns{j, max(0, t.column - j), min(E::kCount, end - j)};
  return {columns, row < stride ? row : t.rows, stride};
}

// f(row in the tile, columns) for the vectors that the thread owns.
template <class E, class Function>
__device__ __forceinline__ void for_each_vector(const Tile& t, Function&& f) {
  const Share share = share_of<E>(t);
  for (int row = share.first_row; row < t.rows; row += share.row_stride) f(row, share.columns);
}

// The numbers of the update, in registers.
template <class T>
struct Update {
  T unscale, lr, momentum, weight_decay;
  RoundingKey key;  // of the layer

  Update() = default;
  __device__ Update(const StepArguments& a, const StepLayer& l)
      : unscale(static_cast<T>(1.0 / read(a.grad_scale))),
        lr(static_cast<T>(read(a.lr))),
        momentum(static_cast<T>(a.momentum)),
        weight_decay(static_cast<T>(a.weight_decay)),
        key(a.key.stream(static_cast<uint64_t>(l.index))) {}

  // M <- momentum M + p + weight_decay W for the unscaled gradient p, and the step of W.
  __device__ T new_momentum(T p, T weight, T old_momentum) const {
    return unscale * p + weight_decay * weight + momentum * old_momentum;
  }
  __device__ T new_weight(T weight, T step) const { return weight - lr * step; }
};

// Part 0 is the weight, part 1 the bias; element `at` of it.
template <class E>
__device__ __forceinline__ void update_element(const StepLayer& l,
                                               const Update<typename E::Compute>& u, int part,
                                               int64_t at, typename E::Compute p) {
  using T = typename E::Compute;
  void* const parameter = part == 0 ? l.weight : l.bias;
  void* const momentum = part == 0 ? l.momentum_weight : l.momentum_bias;
  const RoundingKey key = u.key.stream(part);
  const T weight = load_element<E>(parameter, l.parameter_dtype[part], at);
  T step = 0;
  if (momentum != nullptr) {
    step = u.new_momentum(p, weight, load_element<E>(momentum, l.momentum_dtype[part], at));
    store_element<E>(momentum, l.momentum_dtype[part], at, step, key.stream(0));
  } else {
    step = u.new_momentum(p, weight, T(0));
  }
  store_element<E>(parameter, l.parameter_dtype[part], at, u.new_weight(weight, step),
                   key.stream(1));
}

// W and M of a layer, in the element type of the launch; M is null for alpha2 = 0, by which W is
// multiplied then.
template <class E>
struct Parameters {
  typename E::Stored *weight, *momentum;

  __device__ Parameters(void* weight, void* momentum)
      : weight(static_cast<typename E::Stored*>(weight)),
        momentum(static_cast<typename E::Stored*>(momentum)) {}
  __device__ explicit Parameters(const StepLayer& l) : Parameters(l.weight, l.momentum_weight) {}
};

// W and M at a vector that begins with element `at` of the weight, in registers between load and
// store.
template <class E>
class VectorUpdate {
 public:
  using T = typename E::Compute;
  using Vector = Vec<typename E::Stored, E::kCount>;

  __device__ __forceinline__ void load_from(const Parameters<E>& to, int64_t at) {
    const auto* const momentum = to.momentum == nullptr ? to.weight : to.momentum;
    w_ = load<Cache::kStreaming>(reinterpret_cast<const Vector*>(to.weight + at));
    m_ = load<Cache::kStreaming>(reinterpret_cast<const Vector*>(momentum + at));
  }

  // From the preconditioned gradient p.
  __device__ __forceinline__ void apply(const Parameters<E>& to, const Update<T>& u, int64_t at,
                                        const T (&p)[E::kCount]) {
    using Stored = typename E::Stored;
    T steps[E::kCount], weights[E::kCount];
#pragma unroll
    for (int e = 0; e < E::kCount; ++e) {
      const T weight = widen<T>(w_[e]);
      steps[e] = u.new_momentum(p[e], weight, widen<T>(m_[e]));
      weights[e] = u.new_weight(weight, steps[e]);
    }
    const RoundingKey key = u.key.stream(0);
    store<Cache::kStreaming>(reinterpret_cast<Vector*>(to.weight + at),
                             narrow<Stored>(weights, key.stream(1), at));
    if (to.momentum == nullptr) return;
    store<Cache::kStreaming>(reinterpret_cast<Vector*>(to.momentum + at),
                             narrow<Stored>(steps, key.stream(0), at));
  }

 private:
  Vector w_, m_;
};

// M and W in row i and these columns, from the preconditioned gradient p.
template <class E>
__device__ __forceinline__ void update_vector(const StepLayer& l,
                                              const Update<typename E::Compute>& u, int64_t i,
                                              const Columns& c,
                                              const typename E::Compute (&p)[E::kCount]) {
  const int width = l.weight_columns();
  if constexpr (E::kCount > 1) {
    if (is_vector<E>(l, c)) {
      const int64_t at = i * width + c.j;
      const Parameters<E> parameters(l);
      VectorUpdate<E> vector;
      vector.load_from(parameters, at);
      return vector.apply(parameters, u, at, p);
    }
  }
#pragma unroll
  for (int e = 0; e < E::kCount; ++e) {
    if (e < c.begin || e >= c.end) continue;
    const int j = c.j + e;
    if (j < width) {
      update_element<E>(l, u, 0, i * width + j, p[e]);
    } else {
      update_element<E>(l, u, 1, i, p[e]);
    }
  }
}

}  // namespace singd::cuda
