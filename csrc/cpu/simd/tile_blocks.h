// Blocks on both sides that are no wider than two tiles: a square of G at a time is multiplied from
// the left and from the right, and what is between the products stays in the first cache.

#if SINGD_TILES
// Numbers of a row that are asked for before they are read: squares are too short for the processor
// to see what comes next.
constexpr int64_t kAhead = 128;

// A square of a bfloat16 gradient as the one plane of a right operand, with zeros around it.
SINGD_INLINE void pair_gradient(const StepLayer<float>& layer, const Panel& square,
                                uint32_t (*pairs)[kSide]) {
  for (int64_t p = 0; p < kTileRows; ++p) {
    store(pairs[p], Words{});
    store(pairs[p] + 16, Words{});
  }
  for_each_piece(layer, square, [&](const Place& place) {
    const int64_t stride = place.part.gradient_stride, at = place.at, n = place.columns;
    const auto* gradient =
        static_cast<const BFloat16*>(place.part.gradient.data) + place.gradient_slot(0);
    if (place.panel_row % 2 != 0) {  // a bias below the weight, of one row
      for (int64_t j = 0; j < n; ++j) {
        pairs[place.panel_row / 2][j] |= uint32_t{gradient[j].bits} << 16;
      }
      return;
    }
    const uint32_t columns = first_lanes(n);
    for (int64_t i = 0; i < place.rows; i += 2, gradient += 2 * stride) {
      const bool is_pair = i + 1 < place.rows;
      const BFloat16* next = gradient + (is_pair ? stride : 0);
      uint32_t* to = pairs[(place.panel_row + i) / 2];
      if (at > 0) {  // a bias behind the weight, of one column
        to[at] = gradient->bits | (is_pair ? uint32_t{next->bits} << 16 : 0);
        continue;
      }
      __builtin_prefetch(gradient + kAhead);
      __builtin_prefetch(next + kAhead);
      const __m512i upper = _mm512_maskz_loadu_epi16(columns, gradient);
      const __m512i lower = _mm512_maskz_loadu_epi16(is_pair ? columns : 0, next);
      _mm512_storeu_si512(to, zip_low(upper, lower));
      _mm512_storeu_si512(to + 16, zip_high(upper, lower));
    }
  });
}

// C C^T G K K^T of a panel to `to`, if its blocks are so.
inline bool precondition_squares(const StepLayer<float>& layer, const Panel& panel, float* to) {
  const LocalProduct<float>&left = layer.left, &right = layer.right;
  if (left.kind != LocalKind::kBlocks || right.kind != LocalKind::kBlocks ||
      left.layout.block > kSide || right.layout.block > kSide || layer.options.unscale != 1 ||
      layer.has_taps()) {
    return false;
  }
  alignas(64) uint32_t pairs[kTileRows][kSide], high[kSide][kTileRows], low[kSide][kTileRows];
  alignas(64) float between[kSide][kSide];
  const int64_t stride = panel.stride();
  for_each_block(left, [&](int64_t row, int64_t height, int64_t, int64_t left_at) {
    if (row < panel.row_begin || row >= panel.row_end) return;
    const Planes by_left = left_planes(left.blocks + left_at, left.stride_of(height));
    for_each_block(right, [&](int64_t column, int64_t width, int64_t, int64_t right_at) {
      if (column < panel.column_begin || column >= panel.column_end) return;
      SINGD_COUNT(multiply_adds, height * width * (height + width));
      pair_gradient(layer, {row, row + height, column, column + width}, pairs);
      multiply_square(height, width, 1, by_left, {pairs[0], nullptr, kSide}, between[0], kSide,
                      false);
      for (int64_t i = 0; i < height; ++i) split_row(between[i], width, high[i], low[i]);
      // Whole tiles are written, over the beginning of the next blocks, which are written later.
      multiply_square(height, width, 1, {high[0], low[0], kTileRows},
                      right_planes(right.blocks + right_at, right.stride_of(width)),
                      to + (row - panel.row_begin) * stride + column - panel.column_begin, stride,
                      false);
    });
  });
  return true;
}
#else
template <class T>
bool precondition_squares(const StepLayer<T>&, const Panel&, T*) {
  return false;
}
#endif
