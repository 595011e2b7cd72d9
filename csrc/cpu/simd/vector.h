// Vectors and conversions. Included once per instruction set into a namespace of its own: nothing
// here may be shared between the sets, or the linker could keep the copy that this processor lacks.
// So no standard containers, and no inline functions from elsewhere.

// SINGD_COUNT(what, n): n elements or multiply_adds are about to be worked on. Only the test of the
// operations' growth counts them.
#ifndef SINGD_COUNT
#define SINGD_COUNT(what, n)
#endif

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T, int kBytes = SINGD_VECTOR_BYTES>
using Vector = typename VectorOf<T, kBytes>::type;

template <class T>
constexpr int kLanes = SINGD_VECTOR_BYTES / static_cast<int>(sizeof(T));

#define SINGD_INLINE inline __attribute__((always_inline))

template <class T, int kBytes = SINGD_VECTOR_BYTES>
SINGD_INLINE Vector<T, kBytes> load(const T* from) {
  Vector<T, kBytes> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class T, int kBytes = SINGD_VECTOR_BYTES>
SINGD_INLINE void store(T* to, const Vector<T, kBytes>& v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class T>
SINGD_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
SINGD_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

// sum += a b, lane by lane; what the sums of a matrix product are made of.
SINGD_INLINE void add_product(Vector<float>& sum, const Vector<float>& a, const Vector<float>& b) {
  sum += a * b;
}
SINGD_INLINE void add_product(Vector<double>& sum, const Vector<double>& a,
                              const Vector<double>& b) {
  sum += a * b;
}

// x in every lane; subtraction keeps -0, and costs nothing.
template <class T>
SINGD_INLINE Vector<T> splat(T x) {
  return x - Vector<T>{};
}

// Scratch as numbers of another type of the same size.
template <class To, class From>
SINGD_INLINE To* as(From* from) {
  static_assert(sizeof(To) == sizeof(From));
  return reinterpret_cast<To*>(from);
}
template <class To, class From>
SINGD_INLINE const To* as(const From* from) {
  static_assert(sizeof(To) == sizeof(From));
  return reinterpret_cast<const To*>(from);
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SINGD_INLINE float widen(float x) { return x; }
SINGD_INLINE double widen(double x) { return x; }

SINGD_INLINE float widen(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

SINGD_INLINE float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // Subnormal numbers are multiples of 2^-24, the last place of numbers in [0.5, 1).
  const float subnormal = __builtin_bit_cast(float, magnitude | 0x3f000000u) - 0.5f;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
  bits = magnitude < 0x0400u ? __builtin_bit_cast(uint32_t, subnormal) : bits;
  return __builtin_bit_cast(float, bits | sign);
}

template <class To>
struct Narrow;

template <>
struct Narrow<float> {
  template <class T>
  SINGD_INLINE static float of(T x) {
    return static_cast<float>(x);
  }
};

template <>
struct Narrow<double> {
  template <class T>
  SINGD_INLINE static double of(T x) {
    return static_cast<double>(x);
  }
};

// Round to nearest, ties to even.
template <>
struct Narrow<BFloat16> {
  template <class T>
  SINGD_INLINE static BFloat16 of(T x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(x));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
  }
};

template <>
struct Narrow<Float16> {
  template <class T>
  SINGD_INLINE static Float16 of(T x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(x));
    const uint32_t magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    const float subnormal = __builtin_bit_cast(float, magnitude) + 0.5f;
    uint32_t normal = magnitude - (112u << 23);
    normal = (normal + 0xfffu + ((normal >> 13) & 1u)) >> 13;
    uint32_t half = magnitude >= 0x477ff000u ? 0x7c00u : normal;  // 65520 rounds to infinity
    half = magnitude < 0x38800000u ? __builtin_bit_cast(uint32_t, subnormal) - 0x3f000000u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return {static_cast<uint16_t>(half | sign)};
  }
};

template <class T>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};

// f(Stored*) with the array's pointer in its own type; Float* for const arrays.
template <class Function>
SINGD_INLINE void with_type(const Array& array, Function f) {
  switch (array.type) {
    case Scalar::kFloat64:
      return f(static_cast<double*>(array.data));
    case Scalar::kFloat32:
      return f(static_cast<float*>(array.data));
    case Scalar::kBFloat16:
      return f(static_cast<BFloat16*>(array.data));
    case Scalar::kFloat16:
      return f(static_cast<Float16*>(array.data));
  }
}
template <class Function>
SINGD_INLINE void with_type(const ConstArray& array, Function f) {
  switch (array.type) {
    case Scalar::kFloat64:
      return f(static_cast<const double*>(array.data));
    case Scalar::kFloat32:
      return f(static_cast<const float*>(array.data));
    case Scalar::kBFloat16:
      return f(static_cast<const BFloat16*>(array.data));
    case Scalar::kFloat16:
      return f(static_cast<const Float16*>(array.data));
  }
}

template <class T>
constexpr Scalar kScalar = sizeof(T) == sizeof(double) ? Scalar::kFloat64 : Scalar::kFloat32;

// to[j] = scale from[j].
template <class Stored, class T>
SINGD_INLINE void load_row(const Stored* from, int64_t count, T scale, T* to) {
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) to[j] = scale * static_cast<T>(widen(from[j]));
}

// The same of numbers of T, where they may stay.
template <class T>
SINGD_INLINE void copy_scaled(const T* from, int64_t count, T scale, T* to) {
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) to[j] = scale * from[j];
}

// to[j] = scale from[j] + factor beside[j].
template <class Stored, class T>
SINGD_INLINE void load_row_beside(const Stored* from, int64_t count, T scale, T factor,
                                  const T* beside, T* to) {
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) {
    to[j] = scale * static_cast<T>(widen(from[j])) + factor * beside[j];
  }
}

// Stores past the caches: no cache line has to be owned first, which is what an ordinary store
// waits for where other processors have read the line. `to` is aligned to whole vectors.
SINGD_INLINE void stream_vector(float* to, const Vector<float>& v) {
#if !defined(__x86_64__)
  store<float>(to, v);
#elif defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vector<float>*>(to));
#elif SINGD_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(to, v);
#elif SINGD_VECTOR_BYTES == 32
  __builtin_ia32_movntps256(to, v);
#else
  __builtin_ia32_movntps(to, v);
#endif
}

// Streamed numbers are seen by other threads after this.
SINGD_INLINE void end_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

constexpr int64_t kLineBytes = 64;  // of a cache

// Copies numbers of which whole lines are streamed.
template <class Stored>
SINGD_INLINE void stream(Stored* to, const Stored* from, int64_t count) {
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(Stored));
  int64_t j = 0;
  for (; j < count && reinterpret_cast<uintptr_t>(to + j) % kLineBytes != 0; ++j) to[j] = from[j];
  for (; j + kLineBytes / kSize <= count; j += kLineBytes / kSize) {
    const auto* source = reinterpret_cast<const char*>(from + j);
    for (int64_t byte = 0; byte < kLineBytes; byte += SINGD_VECTOR_BYTES) {
      Vector<float> v;
      __builtin_memcpy(&v, source + byte, sizeof v);
      stream_vector(reinterpret_cast<float*>(reinterpret_cast<char*>(to + j) + byte), v);
    }
  }
  for (; j < count; ++j) to[j] = from[j];
}

// The magnitude of a number as an integer that grows with it; NaN is larger than infinity.
SINGD_INLINE uint32_t magnitude_bits(float x) {
  return __builtin_bit_cast(uint32_t, x) & 0x7fffffffu;
}
SINGD_INLINE uint64_t magnitude_bits(double x) {
  return __builtin_bit_cast(uint64_t, x) & 0x7fffffffffffffffull;
}
SINGD_INLINE uint16_t magnitude_bits(BFloat16 x) { return x.bits & 0x7fffu; }
SINGD_INLINE uint16_t magnitude_bits(Float16 x) { return x.bits & 0x7fffu; }
SINGD_INLINE float magnitude_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
SINGD_INLINE double magnitude_of(uint64_t bits) { return __builtin_bit_cast(double, bits); }

template <class T>
SINGD_INLINE Vector<T> magnitudes(const Vector<T>& v) {
  using Bits = decltype(magnitude_bits(T(0)));
  return (Vector<T>)((Vector<Bits>)v & (~Bits(0) >> 1));
}

// max |x|, as magnitude bits.
template <class T>
SINGD_INLINE auto largest_bits(const T* x, int64_t count) {
  auto most = magnitude_bits(T(0));
  for (int64_t j = 0; j < count; ++j) most = larger(most, magnitude_bits(x[j]));
  return most;
}
template <class T>
constexpr auto kInfinityBits = sizeof(T) == 4 ? 0x7f800000ull : 0x7ff0000000000000ull;

// Whether numbers are finite as they are stored: one that is can round to infinity.
template <class T, class Stored>
SINGD_INLINE bool are_finite(const Stored* stored, int64_t count) {
  auto most = magnitude_bits(T(0));
  for (int64_t i = 0; i < count; ++i) {
    most = larger(most, magnitude_bits(static_cast<T>(widen(stored[i]))));
  }
  return most < kInfinityBits<T>;
}
