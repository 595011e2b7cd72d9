// Transposes, in squares whose rows are pieces of 16 bytes, which every instruction set has.

constexpr int kPieceBytes = 16;
template <class T>
using Piece = Vector<T, kPieceBytes>;

// Lanes of two pieces, those of b counted on from those of a.
#if defined(__clang__)
#define SINGD_PICK(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SINGD_PICK(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

SINGD_INLINE void transpose_square(const float* from, int64_t from_stride, float* to,
                                   int64_t to_stride) {
  typedef int Lanes __attribute__((vector_size(16)));
  Piece<float> rows[4], pairs[4];
  for (int i = 0; i < 4; ++i) rows[i] = load<float, kPieceBytes>(from + i * from_stride);
  for (int i = 0; i < 2; ++i) {
    pairs[i] = SINGD_PICK(Lanes, rows[2 * i], rows[2 * i + 1], 0, 4, 1, 5);
    pairs[2 + i] = SINGD_PICK(Lanes, rows[2 * i], rows[2 * i + 1], 2, 6, 3, 7);
  }
  for (int i = 0; i < 2; ++i) {
    const Piece<float>&a = pairs[2 * i], &b = pairs[2 * i + 1];
    store<float, kPieceBytes>(to + 2 * i * to_stride, SINGD_PICK(Lanes, a, b, 0, 1, 4, 5));
    store<float, kPieceBytes>(to + (2 * i + 1) * to_stride, SINGD_PICK(Lanes, a, b, 2, 3, 6, 7));
  }
}

SINGD_INLINE void transpose_square(const double* from, int64_t from_stride, double* to,
                                   int64_t to_stride) {
  typedef long Lanes __attribute__((vector_size(16)));
  const Piece<double> a = load<double, kPieceBytes>(from),
                      b = load<double, kPieceBytes>(from + from_stride);
  store<double, kPieceBytes>(to, SINGD_PICK(Lanes, a, b, 0, 2));
  store<double, kPieceBytes>(to + to_stride, SINGD_PICK(Lanes, a, b, 1, 3));
}

// The transpose of `from` [rows, columns]; its rows are padded with zeros to `to_stride`.
template <class T>
void transpose_padded(const T* from, int64_t rows, int64_t columns, int64_t from_stride, T* to,
                      int64_t to_stride) {
  SINGD_COUNT(elements, columns * to_stride);
  constexpr int64_t kSide = kPieceBytes / static_cast<int64_t>(sizeof(T));
  const int64_t whole = columns / kSide * kSide;
  int64_t i = 0;
  for (; i + kSide <= rows; i += kSide) {
    const T* strip = from + i * from_stride;
    for (int64_t j = 0; j < whole; j += kSide) {
      transpose_square(strip + j, from_stride, to + j * to_stride + i, to_stride);
    }
    for (int64_t j = whole; j < columns; ++j) {
      for (int64_t k = 0; k < kSide; ++k) to[j * to_stride + i + k] = strip[k * from_stride + j];
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t r = i; r < rows; ++r) to[j * to_stride + r] = from[r * from_stride + j];
    for (int64_t r = rows; r < to_stride; ++r) to[j * to_stride + r] = T(0);
  }
}
