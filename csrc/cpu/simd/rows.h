// Rows of X as the products take them: converted and padded with zeros, one below the other.

// Row r of the matrix is position r % shared of sample r / shared; reduced rows are whole samples.
template <class Stored>
SINGD_INLINE const Stored* row_start(const RowsView& rows, const Stored* data, int64_t row) {
  if (rows.reduce) return data + row * rows.batch_stride;
  if (row < rows.shared) return data + row * rows.shared_stride;  // without a division
  return data + row / rows.shared * rows.batch_stride + row % rows.shared * rows.shared_stride;
}

// Columns [begin, end) of the features of the given rows, added up over the shared positions if
// reduced. With strided features the rows are the inner loop: they tend to lie side by side.
template <class Stored, class T>
SINGD_INLINE void load_features(const RowsView& rows, const Stored* data, int64_t first,
                                int64_t count, int64_t begin, int64_t end, T* to, int64_t stride) {
  const int64_t step = rows.feature_stride;
  const int64_t uses = rows.reduce ? rows.shared : 1;
  const T scale = static_cast<T>(rows.scale);
  if (step == 1 && uses == 1) {
    for (int64_t r = 0; r < count; ++r) {
      load_row(row_start(rows, data, first + r) + begin, end - begin, scale, to + r * stride);
    }
    return;
  }
  if (step == 1) {
    for (int64_t r = 0; r < count; ++r) {
      const Stored* from = row_start(rows, data, first + r) + begin;
      T* row = to + r * stride;
      for (int64_t j = 0; j < end - begin; ++j) row[j] = T(0);
      for (int64_t s = 0; s < uses; ++s, from += rows.shared_stride) {
#pragma GCC ivdep
        for (int64_t j = 0; j < end - begin; ++j) row[j] += static_cast<T>(widen(from[j]));
      }
#pragma GCC ivdep
      for (int64_t j = 0; j < end - begin; ++j) row[j] *= scale;
    }
    return;
  }
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t r = 0; r < count; ++r) {
      const Stored* from = row_start(rows, data, first + r) + j * step;
      T sum = 0;
      for (int64_t s = 0; s < uses; ++s) sum += static_cast<T>(widen(from[s * rows.shared_stride]));
      to[r * stride + j - begin] = scale * sum;
    }
  }
}

// Columns [begin, end) of rows [first, first + count), `stride` apart, with zeros up to `width`;
// the column behind the features is that of the ones.
template <class T>
SINGD_INLINE void bring_rows(const RowsView& rows, int64_t first, int64_t count, int64_t begin,
                             int64_t end, T* to, int64_t stride, int64_t width) {
  SINGD_COUNT(elements, count * width);
  const int64_t features = smaller(end, rows.features);
  if (begin < features) {
    with_type(rows.array, [&](const auto* data) {
      load_features(rows, data, first, count, begin, features, to, stride);
    });
  }
  const int64_t loaded = larger<int64_t>(features - begin, 0);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = loaded; j < width; ++j) to[r * stride + j] = T(0);
    if (end > rows.features) to[r * stride + rows.features - begin] = static_cast<T>(rows.one);
  }
}

template <class T>
void load_rows(const RowsView& rows, int64_t first, int64_t count, int64_t begin, int64_t end,
               T* to, int64_t stride) {
  bring_rows(rows, first, count, begin, end, to, stride, stride);
}

// Rows of X that share a row of scratch with elements In.
template <class In>
constexpr int64_t kRowsTogether = 1;

// four(a, b, c, d) for rows of four quarters of `count`, and one(r) for the rows that are left: one
// core has more of a memory's rate where it follows several streams.
template <class Four, class One>
SINGD_INLINE void for_each_four(int64_t count, Four four, One one) {
  const int64_t quarter = count / 4;
  for (int64_t r = 0; r < quarter; ++r) four(r, quarter + r, 2 * quarter + r, 3 * quarter + r);
  for (int64_t r = 4 * quarter; r < count; ++r) one(r);
}

// Asks for a rectangle of X, along its rows, as memory is fastest: what is multiplied next is read
// in pieces of rows.
SINGD_INLINE void ask_for_rows(const RowsView& rows, int64_t first, int64_t count, int64_t begin,
                               int64_t end) {
  if (rows.reduce || rows.feature_stride != 1) return;
  const int64_t last = smaller(end, rows.features);
  with_type(rows.array, [&](const auto* data) {
    for (int64_t r = first; r < first + count; ++r) {
      const auto* row = row_start(rows, data, r);
      const auto* line = reinterpret_cast<const char*>(row + begin);
      const auto* past = reinterpret_cast<const char*>(row + last);
      for (; line < past; line += kLineBytes) __builtin_prefetch(line, 0, 2);
    }
  });
}

#if SINGD_BFLOAT16_PRODUCTS
template <>
constexpr int64_t kRowsTogether<Pair> = 2;

// Rows of bfloat16 numbers that lie side by side, two of them as one row of pairs; where their
// number is odd the last is paired with zeros.
SINGD_INLINE void bring_rows(const RowsView& rows, int64_t first, int64_t count, int64_t begin,
                             int64_t end, Pair* to, int64_t stride, int64_t width) {
  constexpr uint32_t kOne = 0x3f80;
  const auto* data = static_cast<const BFloat16*>(rows.array.data);
  const int64_t features = smaller(end, rows.features) - begin;
  for (int64_t r = 0; r < count; r += 2, to += stride) {
    const bool is_pair = r + 1 < count;
    const BFloat16* upper = row_start(rows, data, first + r) + begin;
    const BFloat16* lower = is_pair ? row_start(rows, data, first + r + 1) + begin : upper;
    const int64_t whole = smaller(features, width) / 32 * 32;
    for (int64_t j = 0; is_pair && j < whole; j += 32) {
      const __m512i above = _mm512_loadu_si512(upper + j), below = _mm512_loadu_si512(lower + j);
      _mm512_storeu_si512(to + j, zip_low(above, below));
      _mm512_storeu_si512(to + j + 16, zip_high(above, below));
    }
    for (int64_t j = is_pair ? whole : 0; j < width; j += 32) {
      const uint32_t loaded = first_lanes(features - j), paired = is_pair ? loaded : 0;
      const __m512i above = _mm512_maskz_loadu_epi16(loaded, upper + j);
      const __m512i below = _mm512_maskz_loadu_epi16(paired, lower + j);
      const uint32_t stored = first_lanes(width - j);
      _mm512_mask_storeu_epi32(to + j, static_cast<__mmask16>(stored), zip_low(above, below));
      _mm512_mask_storeu_epi32(to + j + 16, static_cast<__mmask16>(stored >> 16),
                               zip_high(above, below));
    }
    if (end > rows.features) to[rows.features - begin] = is_pair ? kOne << 16 | kOne : kOne;
  }
}
#endif

// f(first row, rows) for chunks of the rows [begin, end): kChunkDepth rows of scratch.
template <class In, class Function>
SINGD_INLINE void for_each_chunk(int64_t begin, int64_t end, Function f) {
  constexpr int64_t kChunk = kChunkDepth * kRowsTogether<In>;
  for (int64_t first = begin; first < end; first += kChunk) f(first, smaller(kChunk, end - first));
}
