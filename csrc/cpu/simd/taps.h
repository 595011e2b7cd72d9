// Rows of a convolution's weight in another order than W's, where column c is channel c / taps at
// tap (a position of the kernel) c % taps.
//
// In channels-last order each tap has its channels side by side. A step goes through such rows in
// groups of channels, all taps of each: these are transposed in the first cache between the order
// of W and that of memory. The weight of a transposed convolution has a channel's taps side by
// side, of one row after the other: its channels are apart.

constexpr int64_t kTapNumbers = 4 * kMostTaps;  // the most that a group has

// Channels [channel, channel + count), which hold columns [begin, begin + columns) of W: of the
// first channel all taps from `skip` on.
struct TapGroup {
  int64_t channel, count, begin, columns, skip;

  // The channels of a tap that are among these columns: [first(tap), last(tap)) of the group.
  int64_t first(int64_t tap) const { return tap < skip ? 1 : 0; }
  int64_t last(int64_t tap, int64_t taps) const {
    return tap < skip + columns - (count - 1) * taps ? count : count - 1;
  }
};

// f(group) for columns [begin, end) of a part.
template <class Function>
SINGD_INLINE void for_each_tap_group(const StepPart& part, int64_t begin, int64_t end, Function f) {
  const int64_t taps = part.taps;
  while (begin < end) {
    const int64_t channel = begin / taps, skip = begin % taps;
    const int64_t left = (end - channel * taps + taps - 1) / taps;
    const int64_t count = smaller(left, kTapNumbers / taps);
    const int64_t columns = smaller(end, (channel + count) * taps) - begin;
    f(TapGroup{channel, count, begin, columns, skip});
    begin += columns;
  }
}

// f(first of these columns, slot in the row, count) for columns [first, first + count) of a row
// whose channels are apart.
template <class Function>
SINGD_INLINE void for_each_channel(const StepPart& part, int64_t first, int64_t count, Function f) {
  for (int64_t at = 0; at < count;) {
    const int64_t channel = (first + at) / part.taps, tap = (first + at) % part.taps;
    const int64_t n = smaller(part.taps - tap, count - at);
    f(at, channel * part.apart + tap, n);
    at += n;
  }
}

// Columns [first, first + count) of a row, times `scale`. look(numbers, count) sees all of them,
// and others of the row, as they are stored.
template <class Stored, class T, class Look>
void load_taps(const StepPart& part, const Stored* row, int64_t first, int64_t count, T scale,
               T* to, Look look) {
  const int64_t taps = part.taps, channels = part.width / taps;
  if (part.apart > 0) {
    return for_each_channel(part, first, count, [&](int64_t at, int64_t slot, int64_t n) {
      look(row + slot, n);
      load_row(row + slot, n, scale, to + at);
    });
  }
  alignas(64) T lines[kTapNumbers], columns[kTapNumbers];
  for_each_tap_group(part, first, first + count, [&](const TapGroup& group) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Stored* from = row + tap * channels + group.channel;
      look(from, group.count);
      load_row(from, group.count, scale, lines + tap * group.count);
    }
    const bool whole = group.columns == group.count * taps;
    T* own = to + group.begin - first;
    transpose_rows(lines, taps, group.count, group.count, whole ? own : columns, taps);
    if (!whole) copy_scaled(columns + group.skip, group.columns, T(1), own);
  });
}

template <class T>
const T* part_of(const T* column_scale, int64_t begin) {
  return column_scale != nullptr ? column_scale + begin : nullptr;
}

// f(slot in the row, count, numbers of x times their scales) for all runs in which the row's
// columns [first, first + count) lie in memory; x begins with the first of them.
template <class T, class Function>
void for_each_tap_run(const StepPart& part, int64_t first, int64_t count, const T* x,
                      const T* column_scale, Function f) {
  const int64_t taps = part.taps, channels = part.width / taps;
  alignas(64) T lines[kTapNumbers], columns[kTapNumbers];
  if (part.apart > 0) {
    return for_each_channel(part, first, count, [&](int64_t at, int64_t slot, int64_t n) {
      for (int64_t j = at; j < at + n; ++j) {
        columns[j - at] = column_scale != nullptr ? column_scale[j] * x[j] : x[j];
      }
      f(slot, n, columns);
    });
  }
  for_each_tap_group(part, first, first + count, [&](const TapGroup& group) {
    const T* own = x + group.begin - first;
    const T* scale = part_of(column_scale, group.begin - first);
    for (int64_t j = 0; j < group.columns; ++j) {
      columns[group.skip + j] = scale != nullptr ? scale[j] * own[j] : own[j];
    }
    transpose_rows(columns, group.count, taps, taps, lines, group.count);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t begin = group.first(tap), end = group.last(tap, taps);
      if (begin >= end) continue;
      f(tap * channels + group.channel + begin, end - begin, lines + tap * group.count + begin);
    }
  });
}
