// Memory that is asked for while a product is computed. A core waits for at most some tens of lines
// at a time: who asks for more waits himself. So every tile of a product asks for some, one with
// each of its terms, and they come while it is multiplied.

// Pieces of rows, `stride` bytes apart, of which the tiles to come ask for some lines each.
struct AskedRows {
  const char* row = nullptr;
  int64_t rows = 0, length = 0, stride = 0, lines = 0, at = 0;
  bool write = false;  // lines are to be written: with AVX-512, no other core keeps a copy of them

  SINGD_INLINE void ask_for_line() {
    if (rows <= 0) return;
    if (write) {
      __builtin_prefetch(row + at, 1, 3);
    } else {
      __builtin_prefetch(row + at, 0, 3);
    }
    at += kLineBytes;
    if (at < length) return;
    at = 0;
    row += stride;
    --rows;
  }
};

// What one product after the other asks for.
struct Ahead {
  AskedRows first, second;

  SINGD_INLINE int64_t lines() const { return first.lines + second.lines; }

  // The n-th line of a tile's.
  SINGD_INLINE void ask_for_line(int64_t n) {
    if (n < first.lines) {
      first.ask_for_line();
    } else {
      second.ask_for_line();
    }
  }
};

// Numbers of a whole tile of results.
template <class T>
constexpr int64_t kTileNumbers = SINGD_TILE_ROWS * SINGD_TILE_VECTORS * kLanes<T>;

// Rows of `count` numbers, `stride` numbers apart, all of which so many tiles ask for.
template <class Stored>
SINGD_INLINE AskedRows asked_rows(const Stored* from, int64_t rows, int64_t count, int64_t stride,
                                  int64_t tiles, bool write) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(Stored));
  const int64_t lines = rows * ((count * kSize + kLineBytes - 1) / kLineBytes);
  return {reinterpret_cast<const char*>(from),   rows, count * kSize, stride * kSize,
          lines / larger<int64_t>(1, tiles) + 1, 0,    write};
}
