// Matrices of bfloat16 numbers in pairs: two numbers that a product multiplies and adds up in one
// instruction, with its sums in float32. As A a matrix has them along its rows, as B along its
// columns: number j of row p is the pair of rows 2 p and 2 p + 1. What is not a bfloat16 number is
// rounded.

// The numbers of the first half of a vector and those of the second in turns.
SINGD_INLINE Words turned(const Words& halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Words)_mm512_permutexvar_epi16(order, (__m512i)halves);
}

// Pairs along a row of `count` numbers, a multiple of 16. They may lie where the row does.
SINGD_INLINE void pair_row(const float* row, int64_t count, Pair* to) {
  int64_t j = 0;
  for (; j + 32 <= count; j += 32) store(to + j / 2, rounded(load(row + j), load(row + j + 16)));
  if (j < count) {
    const Words last = rounded(load(row + j), Floats{});
    __builtin_memcpy(to + j / 2, &last, 16 * sizeof(BFloat16));
  }
}

// Two rows as one of pairs, which may lie where the upper row does; without a lower one, pairs with
// zero.
SINGD_INLINE void pair_two_rows(const float* upper, const float* lower, int64_t count, Pair* to) {
  for (int64_t j = 0; j < count; j += 16) {
    const Floats other = lower != nullptr ? load(lower + j) : Floats{};
    store(to + j, turned(rounded(load(upper + j), other)));
  }
}

// The rows of a matrix in pairs, in its place; the stride stays.
SINGD_INLINE void pair_rows(float* matrix, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; r += 2) {
    const float* upper = matrix + r * stride;
    pair_two_rows(upper, r + 1 < rows ? upper + stride : nullptr, stride,
                  as<Pair>(matrix + r / 2 * stride));
  }
}
