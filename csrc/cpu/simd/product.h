// C <- A B + C, A B, or A B + C diag(scale), with A B in registers: the one matrix product of the
// sparse structures. Rows of B and C are contiguous, A has any strides; `columns` is a multiple of
// the vector length, which padding makes it. A and B have elements In: T, or pairs of it.
//
// Terms are summed up apart from C, and long sums in parts: one after the other, a thousand terms
// round several times as much as those of a matrix product of ATen's.
//
// Large tiles ask for memory that is needed later, where `ahead` is given.

// What becomes of the old C.
template <class T>
struct Before {
  bool keep;
  const T* scale;  // of columns; null for 1
};
template <class T>
constexpr Before<T> kOverwrite{false, nullptr};
template <class T>
constexpr Before<T> kAdd{true, nullptr};

template <class T>
struct Operand {
  const T* data;
  int64_t row_stride, column_stride;
};

template <class T, class In, int kRows, int kVectors>
SINGD_INLINE void multiply_tile(int64_t depth, const Operand<In>& a, const In* b, int64_t b_stride,
                                T* c, int64_t c_stride, Before<T> before, Ahead* ahead) {
  constexpr bool kLarge = 2 * kRows * kVectors >= SINGD_TILE_ROWS * SINGD_TILE_VECTORS;
  int64_t asked = 0;
  const int64_t lines = kLarge && ahead != nullptr ? ahead->lines() : 0;
  while (asked < lines - depth) ahead->ask_for_line(asked++);  // more than there are terms
  Vector<T> sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector<T>{};
  }
  const In* column = a.data;
  const auto add_term = [&] {
    Vector<In> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load<In>(b + v * kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vector<In> factor = splat(column[r * a.row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) add_product(sums[r][v], factor, row[v]);
    }
    b += b_stride;
    column += a.column_stride;
  };
  int64_t p = 0;
  for (; asked < lines; ++p) {
    ahead->ask_for_line(asked++);
    add_term();
  }
  for (; p < depth; ++p) add_term();
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + r * c_stride + v * kLanes<T>;
      if (before.scale != nullptr) {
        sums[r][v] += load<T>(to) * load<T>(before.scale + v * kLanes<T>);
      } else if (before.keep) {
        sums[r][v] += load<T>(to);
      }
      store<T>(to, sums[r][v]);
    }
  }
}

template <class T, class In, int kVectors>
void multiply_rows(int64_t rows, int64_t depth, Operand<In> a, const In* b, int64_t b_stride, T* c,
                   int64_t c_stride, Before<T> before, Ahead* ahead) {
  // A narrow tile is higher: it has about as many sums, which keep the processor busy.
  constexpr int kRows = SINGD_TILE_ROWS * SINGD_TILE_VECTORS / kVectors < SINGD_MOST_TILE_ROWS
                            ? SINGD_TILE_ROWS * SINGD_TILE_VECTORS / kVectors
                            : SINGD_MOST_TILE_ROWS;
  int64_t r = 0;
  const auto advance = [&](int count) {
    r += count;
    a.data += count * a.row_stride;
    c += count * c_stride;
  };
  while (r + kRows <= rows) {
    multiply_tile<T, In, kRows, kVectors>(depth, a, b, b_stride, c, c_stride, before, ahead);
    advance(kRows);
  }
  while (kRows > 6 && r + 6 <= rows) {
    multiply_tile<T, In, 6, kVectors>(depth, a, b, b_stride, c, c_stride, before, ahead);
    advance(6);
  }
  while (r + 4 <= rows) {
    multiply_tile<T, In, 4, kVectors>(depth, a, b, b_stride, c, c_stride, before, ahead);
    advance(4);
  }
  if (r + 2 <= rows) {
    multiply_tile<T, In, 2, kVectors>(depth, a, b, b_stride, c, c_stride, before, ahead);
    advance(2);
  }
  if (r < rows) {
    multiply_tile<T, In, 1, kVectors>(depth, a, b, b_stride, c, c_stride, before, ahead);
  }
}

constexpr int64_t kLongestSum = 256;

template <class T, class In = T>
void multiply(int64_t rows, int64_t columns, int64_t depth, Operand<In> a, const In* b,
              int64_t b_stride, T* c, int64_t c_stride, Before<T> before, Ahead* ahead = nullptr) {
  for (; depth > kLongestSum; depth -= kLongestSum, before = kAdd<T>) {
    multiply(rows, columns, kLongestSum, a, b, b_stride, c, c_stride, before, ahead);
    a.data += kLongestSum * a.column_stride;
    b += kLongestSum * b_stride;
  }
  SINGD_COUNT(multiply_adds, rows * columns * depth);
  constexpr int64_t kMost = SINGD_TILE_VECTORS, kLane = kLanes<T>;
  for (int64_t j = 0; j < columns;) {
    const int64_t left = (columns - j) / kLane;
    // A tile one vector wide has too few sums to keep the processor busy.
    const int64_t vectors = left == kMost + 1 ? kMost - 1 : smaller(left, kMost);
    const Before<T> at{before.keep, before.scale != nullptr ? before.scale + j : nullptr};
    const auto tiles = [&](auto multiply) {
      multiply(rows, depth, a, b + j, b_stride, c + j, c_stride, at, ahead);
    };
    switch (vectors) {
      case 1:
        tiles(multiply_rows<T, In, 1>);
        break;
      case 2:
        tiles(multiply_rows<T, In, 2>);
        break;
      case 3:
        tiles(multiply_rows<T, In, 3>);
        break;
      default:
        tiles(multiply_rows<T, In, SINGD_TILE_VECTORS>);
    }
    j += vectors * kLane;
  }
}

// The sum of a vector's numbers, half by half.
template <class T, int kBytes = SINGD_VECTOR_BYTES>
SINGD_INLINE T lane_sum(const Vector<T, kBytes>& v) {
  if constexpr (kBytes == sizeof(T)) {
    return v[0];
  } else {
    struct alignas(kBytes) Halves {
      Vector<T, kBytes / 2> low, high;
    };
    const auto halves = __builtin_bit_cast(Halves, v);
    return lane_sum<T, kBytes / 2>(halves.low + halves.high);
  }
}

// The dot product of two rows of whole vectors.
template <class T>
SINGD_INLINE T dot_product(const T* a, const T* b, int64_t count) {
  constexpr int kSums = 4;
  Vector<T> sums[kSums] = {};
  int64_t j = 0;
  for (; j + kSums * kLanes<T> <= count; j += kSums * kLanes<T>) {
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) {
      add_product(sums[v], load<T>(a + j + v * kLanes<T>), load<T>(b + j + v * kLanes<T>));
    }
  }
  for (; j < count; j += kLanes<T>) add_product(sums[0], load<T>(a + j), load<T>(b + j));
  return lane_sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows of B up to which the dot products of multiply_few are faster than whole vectors of padded
// columns.
constexpr int64_t kFewColumns = 8;

// C = A B^T for few rows of B: dot products of rows, which need no padded transpose. The rows of A
// and B are zero from the depth to the next whole vector.
template <class T>
void multiply_few(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride,
                  const T* b, int64_t b_stride, T* c, int64_t c_stride) {
  SINGD_COUNT(multiply_adds, rows * columns * depth);
  constexpr int kRows = 4;
  for (int64_t j = 0; j < columns; ++j) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      Vector<T> sums[kRows] = {};
      for (int64_t p = 0; p < depth; p += kLanes<T>) {
        const Vector<T> factor = load<T>(b + j * b_stride + p);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r] += load<T>(a + (i + r) * a_stride + p) * factor;
      }
      for (int r = 0; r < kRows; ++r) c[(i + r) * c_stride + j] = lane_sum<T>(sums[r]);
    }
    for (; i < rows; ++i) {
      Vector<T> sum = {};
      for (int64_t p = 0; p < depth; p += kLanes<T>) {
        sum += load<T>(a + i * a_stride + p) * load<T>(b + j * b_stride + p);
      }
      c[i * c_stride + j] = lane_sum<T>(sum);
    }
  }
}
