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

// Of 16-bit numbers: each round zips the first half of the rows with the other one.
SINGD_INLINE void transpose_square(const uint16_t* from, int64_t from_stride, uint16_t* to,
                                   int64_t to_stride) {
  typedef short Lanes __attribute__((vector_size(16)));
  Piece<uint16_t> rows[8], zipped[8];
  for (int i = 0; i < 8; ++i) rows[i] = load<uint16_t, kPieceBytes>(from + i * from_stride);
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      const Piece<uint16_t>&a = rows[i], &b = rows[i + 4];
      zipped[2 * i] = SINGD_PICK(Lanes, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      zipped[2 * i + 1] = SINGD_PICK(Lanes, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; ++i) rows[i] = zipped[i];
  }
  for (int i = 0; i < 8; ++i) store<uint16_t, kPieceBytes>(to + i * to_stride, rows[i]);
}

// The transpose of `from` [rows, columns]. What is left over at the ends is part of a last square
// that overlaps the one before.
template <class T>
void transpose_rows(const T* from, int64_t rows, int64_t columns, int64_t from_stride, T* to,
                    int64_t to_stride) {
  constexpr int64_t kSide = kPieceBytes / static_cast<int64_t>(sizeof(T));
  if (rows < kSide || columns < kSide) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t r = 0; r < rows; ++r) to[j * to_stride + r] = from[r * from_stride + j];
    }
    return;
  }
  for (int64_t next = 0; next < rows; next += kSide) {
    const int64_t i = smaller(next, rows - kSide);
    const auto transpose = [&](int64_t j) {
      transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    };
    for (int64_t j = 0; j + kSide <= columns; j += kSide) transpose(j);
    if (columns % kSide != 0) transpose(columns - kSide);
  }
}

// The same, and its rows are padded with zeros to `to_stride`.
template <class T>
void transpose_padded(const T* from, int64_t rows, int64_t columns, int64_t from_stride, T* to,
                      int64_t to_stride) {
  SINGD_COUNT(elements, columns * to_stride);
  transpose_rows(from, rows, columns, from_stride, to, to_stride);
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t r = rows; r < to_stride; ++r) to[j * to_stride + r] = T(0);
  }
}

// Rows [begin, end) of a square matrix below its diagonal, from above it; in tiles, whose lines
// stay in the first cache.
template <class T>
void mirror_rows(T* square, int64_t dim, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 64;
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t rows = smaller(kTile, end - i);
    SINGD_COUNT(elements, rows * i);
    for (int64_t j = 0; j < i; j += kTile) {
      transpose_rows(square + j * dim + i, smaller(kTile, i - j), rows, dim, square + i * dim + j,
                     dim);
    }
    for (int64_t r = i; r < i + rows; ++r) {
      for (int64_t c = i; c < r; ++c) square[r * dim + c] = square[c * dim + r];
    }
  }
}

[[maybe_unused]] void mirror(void* square, int64_t element_size, int64_t dim, int64_t begin,
                             int64_t end) {
  switch (element_size) {
    case 8:
      return mirror_rows(static_cast<double*>(square), dim, begin, end);
    case 4:
      return mirror_rows(static_cast<float*>(square), dim, begin, end);
    default:
      return mirror_rows(static_cast<uint16_t*>(square), dim, begin, end);
  }
}
