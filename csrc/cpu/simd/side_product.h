// Products with a matrix of P, from either side, on whatever multiplies in this instruction set.

// C <- A B and what becomes of the old C, with a matrix of P as A, its terms from number `first`
// on, or as B. On tiles C has room for whole ones, and `exact` bfloat16 numbers in B cost less.
template <class T>
void multiply_from_left(int64_t rows, int64_t columns, int64_t depth, const T* p, int64_t p_stride,
                        int64_t first, const T* b, int64_t b_stride, [[maybe_unused]] bool exact,
                        T* c, int64_t c_stride, Before<T> before, [[maybe_unused]] Ahead& ahead) {
#if SINGD_TILES
  const Planes planes = left_planes(p, p_stride).from(first / 2);
  multiply_tiles_from_left(rows, columns, depth, planes, b, b_stride, exact, c, c_stride, before);
#else
  multiply<T>(rows, columns, depth, {p + first, p_stride, 1}, b, b_stride, c, c_stride, before,
              &ahead);
#endif
}
template <class T>
void multiply_from_right(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride,
                         const T* p, int64_t p_stride, T* c, int64_t c_stride, Before<T> before,
                         [[maybe_unused]] Ahead& ahead) {
#if SINGD_TILES
  multiply_tiles_from_right(rows, columns, depth, a, a_stride, right_planes(p, p_stride), c,
                            c_stride, before);
#else
  multiply<T>(rows, columns, depth, {a, a_stride, 1}, p, p_stride, c, c_stride, before, &ahead);
#endif
}
