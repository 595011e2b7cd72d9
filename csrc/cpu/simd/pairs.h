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
SINGD_INLINE void pair_along_rows(float* matrix, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, matrix += stride) {
    pair_row(matrix, stride, as<Pair>(matrix));
  }
}

// Two rows of bfloat16 numbers, times a scale, as one of pairs.
SINGD_INLINE void pair_scaled(const BFloat16* upper, const BFloat16* lower, float scale,
                              int64_t count, Pair* to) {
  for (int64_t j = 0; j < count; j += 32) {
    const uint32_t lanes = first_lanes(count - j);
    const auto a = (Words)_mm512_maskz_loadu_epi16(lanes, upper + j);
    const auto b = (Words)_mm512_maskz_loadu_epi16(lower != nullptr ? lanes : 0, lower + j);
    const Words low = turned(rounded(half_of<0>(a) * scale, half_of<0>(b) * scale));
    const Words high = turned(rounded(half_of<1>(a) * scale, half_of<1>(b) * scale));
    _mm512_mask_storeu_epi32(to + j, static_cast<__mmask16>(lanes), (__m512i)low);
    _mm512_mask_storeu_epi32(to + j + 16, static_cast<__mmask16>(lanes >> 16), (__m512i)high);
  }
}
