// Vectors of bfloat16 numbers, for processors that multiply and round them by one instruction.

// Two bfloat16 numbers, whose products one instruction adds to a float32 sum; subnormal numbers
// count as zero there.
using Pair = uint32_t;

SINGD_INLINE void add_product(Vector<float>& sum, const Vector<Pair>& a, const Vector<Pair>& b) {
  sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// The numbers of two vectors in turns: those of their first and those of their last halves.
SINGD_INLINE __m512i zip_low(__m512i a, __m512i b) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(a, order, b);
}
SINGD_INLINE __m512i zip_high(__m512i a, __m512i b) {
  const __m512i order =
      _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                       22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  return _mm512_permutex2var_epi16(a, order, b);
}

// The first `count` of 32 lanes, as a mask.
SINGD_INLINE uint32_t first_lanes(int64_t count) {
  if (count >= 32) return ~0u;
  return count <= 0 ? 0u : (1u << count) - 1u;
}

using Floats = Vector<float>;
using Words = Vector<uint32_t>;

// Two vectors rounded to bfloat16, the second behind the first. NaN stays NaN.
SINGD_INLINE Words rounded(const Floats& a, const Floats& b) {
  return (Words)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}

// The first or second half of such numbers, as float32.
template <int kHalf>
SINGD_INLINE Floats half_of(const Words& numbers) {
  const __m256i half = _mm512_maskz_extracti64x4_epi64(0xf, (__m512i)numbers, kHalf);
  return (Floats)((Words)_mm512_maskz_cvtepu16_epi32(0xffff, half) << 16);
}

// 32 numbers as two vectors.
SINGD_INLINE void load_two(const float* from, Floats (&to)[2]) {
  for (int i = 0; i < 2; ++i) to[i] = load(from + 16 * i);
}
SINGD_INLINE void load_two(const BFloat16* from, Floats (&to)[2]) {
  const Words numbers = load(reinterpret_cast<const uint32_t*>(from));
  to[0] = half_of<0>(numbers);
  to[1] = half_of<1>(numbers);
}

SINGD_INLINE bool has_subnormal(const Floats (&x)[2]) {
  constexpr int kSubnormal = 0x20;
  return (_mm512_fpclass_ps_mask((__m512)x[0], kSubnormal) |
          _mm512_fpclass_ps_mask((__m512)x[1], kSubnormal)) != 0;
}
