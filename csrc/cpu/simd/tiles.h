// Products on AMX tiles of bfloat16 numbers with sums in float32: what tiles hold, and how numbers
// come into that form.
//
//   left tile    16 rows of 32 numbers
//   right tile   16 rows of 16 pairs: row p has rows 2 p and 2 p + 1 of a 32 x 16 matrix, zipped
//   sums         16 rows of 16 float32 numbers
//
// A float32 number is kept as two planes, bfloat16 numbers that add up to it but for 2^-16 of it;
// the product of two low planes is left out. Tiles take subnormal numbers for zero.

constexpr int64_t kTileRows = 16;  // and its columns

#if SINGD_EMULATED_TILES
// For tests on processors without.
template <class Function>
SINGD_INLINE auto with_tiles(Function f) {
  return f();
}
uint32_t emulated[8][16][16];
template <int kTile>
SINGD_INLINE void zero_tile() {
  __builtin_memset(emulated[kTile], 0, sizeof emulated[kTile]);
}
template <int kTile>
SINGD_INLINE void load_tile(const void* from, int64_t stride_bytes) {
  for (int i = 0; i < 16; ++i) {
    __builtin_memcpy(emulated[kTile][i], static_cast<const char*>(from) + i * stride_bytes, 64);
  }
}
template <int kTile>
SINGD_INLINE void store_tile(void* to, int64_t stride_bytes) {
  for (int i = 0; i < 16; ++i) {
    __builtin_memcpy(static_cast<char*>(to) + i * stride_bytes, emulated[kTile][i], 64);
  }
}
SINGD_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
template <int kSums, int kLeft, int kRight>
SINGD_INLINE void multiply_tiles() {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float sum = float_of(emulated[kSums][i][j]);
      for (int p = 0; p < 16; ++p) {
        const uint32_t a = emulated[kLeft][i][p], b = emulated[kRight][p][j];
        sum += float_of(a << 16) * float_of(b << 16);
        sum += float_of(a & 0xffff0000u) * float_of(b & 0xffff0000u);
      }
      emulated[kSums][i][j] = __builtin_bit_cast(uint32_t, sum);
    }
  }
}
#else
// Layout of the instruction's operand.
struct alignas(64) TileShapes {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

SINGD_INLINE void shape_tiles(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
}

// f() with tiles of full size. They are a state of the thread which oneDNN's products share and
// take to be as they left it. (f does not throw: a destructor would need what is shared between
// instruction sets.)
template <class Function>
SINGD_INLINE auto with_tiles(Function f) {
  TileShapes before, full;
  full.palette = 1;
  for (int i = 0; i < 8; ++i) {
    full.row_bytes[i] = 64;
    full.rows[i] = kTileRows;
  }
  asm volatile("sttilecfg %0" : "=m"(before));
  shape_tiles(full);
  const auto result = f();
  shape_tiles(before);
  return result;
}

// In assembly, since what compilers offer does not tell them that memory is read.
template <int kTile>
SINGD_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
SINGD_INLINE void load_tile(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile)
               : "memory");
}
template <int kTile>
SINGD_INLINE void store_tile(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile)
               : "memory");
}
template <int kSums, int kLeft, int kRight>
SINGD_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

#endif

// (Masks of ones, here and below: without, GCC 12 warns of its own header.)

// The transpose of 16 rows of 16 words; it may take their place.
SINGD_INLINE void transpose_tile(const uint32_t* from, int64_t from_stride, uint32_t* to,
                                 int64_t to_stride) {
  __m512i rows[16], pairs[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * from_stride);
  // Words, pairs of words and then fours of them change places.
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_maskz_unpacklo_epi32(0xffff, rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_maskz_unpacklo_epi64(0xff, pairs[i], pairs[i + 2]);
    rows[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, pairs[i], pairs[i + 2]);
    rows[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, pairs[i + 1], pairs[i + 3]);
    rows[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    // Lane l of rows[4 q + i] has column 4 l + i of rows 4 q to 4 q + 3.
    const __m512i a = _mm512_maskz_shuffle_i32x4(0xffff, rows[i], rows[4 + i], 0x88);
    const __m512i b = _mm512_maskz_shuffle_i32x4(0xffff, rows[8 + i], rows[12 + i], 0x88);
    const __m512i c = _mm512_maskz_shuffle_i32x4(0xffff, rows[i], rows[4 + i], 0xdd);
    const __m512i d = _mm512_maskz_shuffle_i32x4(0xffff, rows[8 + i], rows[12 + i], 0xdd);
    pairs[i] = _mm512_maskz_shuffle_i32x4(0xffff, a, b, 0x88);       // lanes 0
    pairs[8 + i] = _mm512_maskz_shuffle_i32x4(0xffff, a, b, 0xdd);   // lanes 2
    pairs[4 + i] = _mm512_maskz_shuffle_i32x4(0xffff, c, d, 0x88);   // lanes 1
    pairs[12 + i] = _mm512_maskz_shuffle_i32x4(0xffff, c, d, 0xdd);  // lanes 3
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, pairs[i]);
}

// The numbers of both halves in turns.
SINGD_INLINE Words in_turns(const Words& numbers) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Words)_mm512_permutexvar_epi16(order, (__m512i)numbers);
}

// Planes of an operand: those of a left one are rows of bfloat16 numbers, of a right one rows of
// pairs. Strides and steps are in units of 4 bytes.
struct Planes {
  const uint32_t *high, *low;
  int64_t stride;

  Planes from(int64_t offset) const { return {high + offset, low + offset, stride}; }
};

// Where the low planes of a matrix in the place of float32 numbers are: a left operand's rows have
// their two planes side by side; of a right operand's pairs of rows the first has the high plane.
SINGD_INLINE Planes left_planes(const float* matrix, int64_t stride) {
  const auto* words = as<const uint32_t>(matrix);
  return {words, words + stride / 2, stride};
}
SINGD_INLINE Planes right_planes(const float* matrix, int64_t stride) {
  const auto* words = as<const uint32_t>(matrix);
  return {words, words + stride, 2 * stride};
}

// 32 numbers of a row to the planes of a left operand.
SINGD_INLINE void split_row(const float* from, int64_t count, uint32_t* high, uint32_t* low) {
  const auto first = static_cast<__mmask16>(first_lanes(count));
  const auto second = static_cast<__mmask16>(first_lanes(count - 16));
  const auto a = (Floats)_mm512_maskz_loadu_ps(first, from);
  const auto b = (Floats)_mm512_maskz_loadu_ps(second, from + 16);
  const Words upper = rounded(a, b);
  store(high, upper);
  store(low, rounded(a - half_of<0>(upper), b - half_of<1>(upper)));
}

// 16 columns of two rows to the planes of a right operand.
SINGD_INLINE void split_pair(const Floats& a, const Floats& b, uint32_t* high, uint32_t* low) {
  const Words upper = in_turns(rounded(a, b));
  store(high, upper);
  store(low, in_turns(rounded(a - (Floats)(upper << 16), b - (Floats)(upper & 0xffff0000u))));
}

// The same of bfloat16 numbers, whose low plane is zero.
SINGD_INLINE void pair_up(const Floats& a, const Floats& b, uint32_t* high) {
  store(high, ((Words)a >> 16) | ((Words)b & 0xffff0000u));
}

// A matrix [rows, stride] in its own place, as left_planes and right_planes find it. The stride and
// the rows of a right operand are whole depths of tiles.
SINGD_INLINE void split_left(float* matrix, int64_t rows, int64_t stride, float* row) {
  auto* planes = as<uint32_t>(row);
  for (int64_t i = 0; i < rows; ++i, matrix += stride) {
    for (int64_t j = 0; j < stride; j += kTileDepth) {
      split_row(matrix + j, kTileDepth, planes + j / 2, planes + (stride + j) / 2);
    }
    __builtin_memcpy(matrix, planes, static_cast<size_t>(stride) * sizeof(float));
  }
}
SINGD_INLINE void split_right(float* matrix, int64_t rows, int64_t stride) {
  for (int64_t i = 0; i < rows; i += 2, matrix += 2 * stride) {
    for (int64_t j = 0; j < stride; j += 16) {
      float *a = matrix + j, *b = a + stride;
      split_pair(load<float>(a), load<float>(b), as<uint32_t>(a), as<uint32_t>(b));
    }
  }
}

// Up to 32 x 32 sums, two tiles a side.
constexpr int64_t kSide = 2 * kTileRows;
template <int kTiles>
SINGD_INLINE void load_left(const uint32_t* plane, int64_t stride) {
  load_tile<4>(plane, 4 * stride);
  if (kTiles > 1) load_tile<5>(plane + kTileRows * stride, 4 * stride);
}
template <int kTiles>
SINGD_INLINE void load_right(const uint32_t* plane, int64_t stride) {
  load_tile<6>(plane, 4 * stride);
  if (kTiles > 1) load_tile<7>(plane + 16, 4 * stride);
}
template <int kRows, int kColumns>
SINGD_INLINE void multiply_loaded() {
  multiply_tiles<0, 4, 6>();
  if (kColumns > 1) multiply_tiles<1, 4, 7>();
  if (kRows > 1) multiply_tiles<2, 5, 6>();
  if (kRows > 1 && kColumns > 1) multiply_tiles<3, 5, 7>();
}

// C <- A B or A B + C for tiles of sums, over so many depths of tiles. B may have no low plane.
template <int kRows, int kColumns>
SINGD_INLINE void multiply_square(int64_t depths, Planes a, Planes b, float* c, int64_t c_stride,
                                  bool add) {
  float* lower = c + kTileRows * c_stride;
  const int64_t bytes = 4 * c_stride;
  if (add) {
    load_tile<0>(c, bytes);
    if (kColumns > 1) load_tile<1>(c + 16, bytes);
    if (kRows > 1) load_tile<2>(lower, bytes);
    if (kRows > 1 && kColumns > 1) load_tile<3>(lower + 16, bytes);
  } else {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t d = 0; d < depths; ++d) {
    load_left<kRows>(a.high, a.stride);
    if (b.low != nullptr) {
      load_right<kColumns>(b.low, b.stride);
      multiply_loaded<kRows, kColumns>();
      b.low += kTileDepth / 2 * b.stride;
    }
    load_right<kColumns>(b.high, b.stride);
    multiply_loaded<kRows, kColumns>();
    b.high += kTileDepth / 2 * b.stride;
    load_left<kRows>(a.low, a.stride);
    multiply_loaded<kRows, kColumns>();
    a = a.from(kTileDepth / 2);
  }
  store_tile<0>(c, bytes);
  if (kColumns > 1) store_tile<1>(c + 16, bytes);
  if (kRows > 1) store_tile<2>(lower, bytes);
  if (kRows > 1 && kColumns > 1) store_tile<3>(lower + 16, bytes);
}

SINGD_INLINE void multiply_square(int64_t rows, int64_t columns, int64_t depths, Planes a, Planes b,
                                  float* c, int64_t c_stride, bool add) {
  if (rows > kTileRows && columns > 16) {
    multiply_square<2, 2>(depths, a, b, c, c_stride, add);
  } else if (rows > kTileRows) {
    multiply_square<2, 1>(depths, a, b, c, c_stride, add);
  } else if (columns > 16) {
    multiply_square<1, 2>(depths, a, b, c, c_stride, add);
  } else {
    multiply_square<1, 1>(depths, a, b, c, c_stride, add);
  }
}

// C times the column scale where there is one; whether products are to be added to what it has.
SINGD_INLINE bool scale_before(int64_t rows, int64_t columns, float* c, int64_t c_stride,
                               const Before<float>& before) {
  for (int64_t i = 0; before.scale != nullptr && i < rows; ++i, c += c_stride) {
    for (int64_t j = 0; j < columns; j += 16) {
      store<float>(c + j, load<float>(c + j) * load<float>(before.scale + j));
    }
  }
  return before.keep || before.scale != nullptr;
}

constexpr int64_t kDeepest = 128;  // numbers of a product's terms that are split at a time

// C <- A B and what becomes of the old C, with A kept as planes of a left operand. Columns are a
// multiple of 16; C has room for the rows of whole tiles. With `exact`, B has bfloat16 numbers.
inline void multiply_tiles_from_left(int64_t rows, int64_t columns, int64_t depth, Planes a,
                                     const float* b, int64_t b_stride, bool exact, float* c,
                                     int64_t c_stride, Before<float> before) {
  SINGD_COUNT(multiply_adds, rows * columns * depth);
  alignas(64) uint32_t high[kDeepest / 2][kSide], low[kDeepest / 2][kSide];
  bool add = scale_before(rows, columns, c, c_stride, before);
  for (int64_t first = 0; first < depth; first += kDeepest, add = true) {
    const int64_t deep = smaller(kDeepest, depth - first), depths = whole_depths(deep) / kTileDepth;
    const Planes terms = a.from(first / 2);
    for (int64_t j = 0; j < columns; j += kSide) {
      const int64_t width = smaller(kSide, columns - j);
      for (int64_t p = 0; p < depths * kTileDepth / 2; ++p) {
        const float* row = b + (first + 2 * p) * b_stride + j;
        const float* next = row + b_stride;
        for (int64_t v = 0; v < width; v += 16) {
          const bool has_row = 2 * p < deep, has_next = 2 * p + 1 < deep;
          const Floats x = has_row ? load<float>(row + v) : Floats{};
          const Floats y = has_next ? load<float>(next + v) : Floats{};
          if (exact) {
            pair_up(x, y, high[p] + v);
          } else {
            split_pair(x, y, high[p] + v, low[p] + v);
          }
        }
      }
      const Planes right{high[0], exact ? nullptr : low[0], kSide};
      for (int64_t i = 0; i < rows; i += kSide) {
        multiply_square(rows - i, width, depths, terms.from(i * a.stride), right,
                        c + i * c_stride + j, c_stride, add);
      }
    }
  }
}

// The same with B kept as planes of a right operand.
inline void multiply_tiles_from_right(int64_t rows, int64_t columns, int64_t depth, const float* a,
                                      int64_t a_stride, Planes b, float* c, int64_t c_stride,
                                      Before<float> before) {
  SINGD_COUNT(multiply_adds, rows * columns * depth);
  constexpr int64_t kStride = kDeepest / 2;
  alignas(64) uint32_t high[kSide][kStride], low[kSide][kStride];
  bool add = scale_before(rows, columns, c, c_stride, before);
  for (int64_t first = 0; first < depth; first += kDeepest, add = true) {
    const int64_t deep = smaller(kDeepest, depth - first), depths = whole_depths(deep) / kTileDepth;
    for (int64_t i = 0; i < rows; i += kSide) {
      const int64_t height = smaller(kSide, rows - i);
      for (int64_t r = 0; r < height; ++r) {
        const float* row = a + (i + r) * a_stride + first;
        for (int64_t p = 0; p < deep; p += kTileDepth) {
          split_row(row + p, deep - p, high[r] + p / 2, low[r] + p / 2);
        }
      }
      for (int64_t j = 0; j < columns; j += kSide) {
        multiply_square(height, columns - j, depths, {high[0], low[0], kStride},
                        b.from(first / 2 * b.stride + j), c + i * c_stride + j, c_stride, add);
      }
    }
  }
}
