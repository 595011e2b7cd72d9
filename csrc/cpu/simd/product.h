// C (+)= A B with C in registers: the one matrix product of the sparse structures. Rows of B and C
// are contiguous, A has any strides; `columns` is a multiple of the vector length, which padding
// makes it.

template <class T>
struct Operand {
  const T* data;
  int64_t row_stride, column_stride;
};

template <class T, int kRows, int kVectors>
SINGD_INLINE void multiply_tile(int64_t depth, const Operand<T>& a, const T* b, int64_t b_stride,
                                T* c, int64_t c_stride, bool add) {
  Vector<T> sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = add ? load<T>(c + r * c_stride + v * kLanes<T>) : Vector<T>{};
    }
  }
  const T* column = a.data;
  for (int64_t p = 0; p < depth; ++p) {
    Vector<T> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load<T>(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T factor = column[r * a.row_stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * row[v];
    }
    b += b_stride;
    column += a.column_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store<T>(c + r * c_stride + v * kLanes<T>, sums[r][v]);
    }
  }
}

template <class T, int kVectors>
void multiply_rows(int64_t rows, int64_t depth, Operand<T> a, const T* b, int64_t b_stride, T* c,
                   int64_t c_stride, bool add) {
  constexpr int kRows = SINGD_TILE_ROWS;
  int64_t r = 0;
  const auto advance = [&](int count) {
    r += count;
    a.data += count * a.row_stride;
    c += count * c_stride;
  };
  while (r + kRows <= rows) {
    multiply_tile<T, kRows, kVectors>(depth, a, b, b_stride, c, c_stride, add);
    advance(kRows);
  }
  if (r + 4 <= rows) {
    multiply_tile<T, 4, kVectors>(depth, a, b, b_stride, c, c_stride, add);
    advance(4);
  }
  if (r + 2 <= rows) {
    multiply_tile<T, 2, kVectors>(depth, a, b, b_stride, c, c_stride, add);
    advance(2);
  }
  if (r < rows) multiply_tile<T, 1, kVectors>(depth, a, b, b_stride, c, c_stride, add);
}

template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Operand<T>& a, const T* b,
              int64_t b_stride, T* c, int64_t c_stride, bool add) {
  constexpr int64_t kStep = int64_t{SINGD_TILE_VECTORS} * kLanes<T>;
  int64_t j = 0;
  for (; j + kStep <= columns; j += kStep) {
    multiply_rows<T, SINGD_TILE_VECTORS>(rows, depth, a, b + j, b_stride, c + j, c_stride, add);
  }
  for (; j + 2 * kLanes<T> <= columns; j += 2 * kLanes<T>) {
    multiply_rows<T, 2>(rows, depth, a, b + j, b_stride, c + j, c_stride, add);
  }
  for (; j < columns; j += kLanes<T>) {
    multiply_rows<T, 1>(rows, depth, a, b + j, b_stride, c + j, c_stride, add);
  }
}
