// The border rows and the diagonal of X^T X, X [m, d], for a border of b <= 64 columns:
//
//   row-bordered K       E[r, j] = sum_rows x[B_r] x[j],  D[j] = sum_rows x[j]^2
//   column-bordered K    the same for y = x K: y[B] = s, given as S [m, b], and y[j] = D_K[j] x[j]
//
// A block of the grid owns a panel of 128 or 64 columns and a split of the rows; it stages the
// border columns beside the panel (they come from L2 after the first panel) and multiplies every
// border tile with every panel tile, and every panel tile with itself for the diagonal. D_K is
// applied to the sums.
//
// Reads X once (and b columns per panel), writes splits x (b + 1) d sums.
#include "../structures/pattern.h"
#include "gram.h"
#include "gram_tile.cuh"
#include "launch.cuh"

namespace singd::cuda {
namespace {

struct Task {
  Rows x, border;
  TileRuns border_runs;
  BorderedPattern pattern;
  int64_t columns;  // of x
  unsigned panels;
  const void* scale;
  bool separate;  // the border columns are another matrix
  bool packed;    // so are the panels
  GramSums sums;

  // The border row that a staged border column stands for; -1 if none.
  __device__ int64_t border_row(int staged) const {
    const int64_t column = border_runs.column(staged);
    if (separate) return column < pattern.border() ? column : -1;
    const bool in_head = staged < border_runs.count[0] * kTile;
    if (in_head ? column >= pattern.head : !pattern.is_tail(column)) return -1;
    return column < pattern.dim ? pattern.border_row(column) : -1;
  }
};

template <class T, class B, int kPanel, RowAccess kAccess>
__global__ __launch_bounds__(kGramThreads,
                             sizeof(T) == 8 ? 1 : 2) void bordered_gram_kernel(Task task) {
  using Tiles = GramTiles<T, B, kPanel, kAccess>;
  using A = typename Tiles::A;
  __shared__ int pairs[kMaxPairs];
  __shared__ int border_rows[kBorderTiles * kTile];  // of the staged columns
  const int64_t split = blockIdx.x / task.panels, panel = blockIdx.x % task.panels;
  const int64_t first = panel * kPanel * kTile;
  const int64_t left = (task.columns - first + kTile - 1) / kTile;
  const int tiles = left < kPanel ? static_cast<int>(left) : kPanel;
  const int border_tiles = task.border_runs.tiles();
  const int products = border_tiles * tiles, pair_count = products + (task.packed ? 0 : tiles);
  static_assert(kMaxPairs <= kGramThreads && kBorderTiles * kTile <= kGramThreads);
  const auto list = [&] {
    const int n = threadIdx.x;
    if (n < pair_count) {
      const int b = Tiles::kPanelStart + n % tiles;
      shared_store(pairs + n, pack_pair(n < products ? n / tiles : b, b));
    }
    if (n < kBorderTiles * kTile) {
      shared_store(border_rows + n, static_cast<int>(task.border_row(n)));
    }
    __syncthreads();
    return pair_count;
  };

  typename Tiles::Input in;
  in.x = &task.x;
  in.border = &task.border;
  in.panel_runs = {{first, 0}, {tiles, 0}};
  in.border_runs = task.border_runs;
  in.begin = task.sums.first_row + split * task.sums.rows;
  in.end = in.begin + task.sums.rows < task.x.count ? in.begin + task.sums.rows : task.x.count;
  in.pairs = pairs;
  const BorderedPattern& pattern = task.pattern;
  const A* scale = static_cast<const A*>(task.scale);
  A* out = static_cast<A*>(task.sums.out) + split * task.sums.stride;
  const bool adds = task.sums.splits == 1;
  Tiles::template run<false>(in, list, [&](int a, int b, int j) {
    int64_t column = first + (b - Tiles::kPanelStart) * kTile + j;
    const bool is_square = a == b;
    bool exists = column < task.columns;
    if (task.packed) {
      exists = column < pattern.border();
      column = pattern.border_index(column);
    } else if (task.separate || is_square) {
      exists = exists && !pattern.is_border(column);
    }
    const bool scaled = scale != nullptr && !task.packed && exists;
    const A factor = scaled ? load(scale + column - pattern.head) : A(1);
    const int* const rows = border_rows + a * kTile;
    return [=, dim = pattern.dim, square = pattern.border() * pattern.dim - pattern.head](int i,
                                                                                          A sum) {
      if (!exists) return;
      int64_t row = 0;
      if (is_square) {
        if (i != j) return;
        sum *= factor * factor;
      } else {
        row = shared_load(rows + i);
        if (row < 0) return;
        sum *= factor;
      }
      A* const to = out + (is_square ? square : row * dim) + column;
      store(to, adds ? load(to) + sum : sum);
    };
  });
}

// The tiles that cover the border columns: each run begins at a 16-byte step of the row.
TileRuns border_runs(const BorderedGram& gram) {
  const auto tiles = [](int64_t columns) {
    return static_cast<int>((columns + kTile - 1) / kTile);
  };
  if (gram.border.data != nullptr) return {{0, 0}, {tiles(gram.head + gram.tail), 0}};
  const int64_t vector = 16 / size_of(gram.x.dtype);
  const int64_t tail_start = (gram.dim - gram.tail) / vector * vector;
  return {{0, tail_start}, {tiles(gram.head), gram.tail > 0 ? tiles(gram.dim - tail_start) : 0}};
}

int64_t panel_columns(const BorderedGram& gram) {
  return (gram.narrow ? kNarrowPanel : kWidePanel) * kTile;
}

template <class T, class B, int kPanel>
void launch_bordered_gram(const Task& task, Stream stream) {
  visit_access(task.x.access, [&](auto access) {
    constexpr RowAccess kAccess = decltype(access)::value;
    launch(Launch{"bordered_gram", task.panels * task.sums.splits, kGramThreads, stream,
                  GramTiles<T, B, kPanel, kAccess>::kSharedBytes},
           bordered_gram_kernel<T, B, kPanel, kAccess>, task);
  });
}
template <class T, class B>
void launch_bordered_gram(const Task& task, bool narrow, Stream stream) {
  if (narrow) return launch_bordered_gram<T, B, kNarrowPanel>(task, stream);
  launch_bordered_gram<T, B, kWidePanel>(task, stream);
}

}  // namespace

bool fits(const BorderedGram& gram) { return border_runs(gram).tiles() <= kBorderTiles; }

int64_t panels(const BorderedGram& gram) {
  const int64_t columns = panel_columns(gram);
  return (gram.x.dim() + columns - 1) / columns;
}

void accumulate(const BorderedGram& gram, const GramSums& sums, Stream stream) {
  Layout layout;
  layout.family = Family::kBordered;
  layout.dim = gram.dim;
  layout.head = gram.head;
  layout.tail = gram.tail;
  const bool separate = gram.border.data != nullptr;
  const Task task{gram.x,
                  separate ? gram.border : gram.x,
                  border_runs(gram),
                  BorderedPattern(layout),
                  gram.x.dim(),
                  static_cast<unsigned>(panels(gram)),
                  gram.scale,
                  separate,
                  gram.packed,
                  sums};
  visit_type(gram.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (separate) return launch_bordered_gram<T, float>(task, gram.narrow, stream);
    }
    launch_bordered_gram<T, T>(task, gram.narrow, stream);
  });
}

}  // namespace singd::cuda
