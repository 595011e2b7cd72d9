// The diagonal blocks of X^T X for a block-diagonal structure of block size k, X [m, d].
//
// A block of the grid owns a panel of whole factor blocks, up to 128 or 64 columns, and a split of
// the rows. The panel is staged as it lies in memory; its 16-column tiles need not begin where
// factor blocks do: the pairs of tiles that some factor block meets are multiplied (k = 32: 12
// pairs of 8 tiles), and what lies between factor blocks is not written. A panel begins at a
// 16-byte step of the row, at most 7 columns before its first factor block.
//
// Reads X once, writes splits x k d sums.
#include "../structures/pattern.h"
#include "gram.h"
#include "gram_tile.cuh"
#include "launch.cuh"

namespace singd::cuda {
namespace {

struct Task {
  Rows x;
  BlockPattern pattern;
  int64_t panel_columns;
  unsigned panels;
  GramSums sums;
};

// The pairs a <= b of tiles of the panel that some factor block meets both of; their number.
__device__ int list_pairs(const BlockPattern& pattern, int64_t first, int64_t begin, int64_t end,
                          int tiles, int* pairs) {
  int count = 0;
  for (int a = 0; a < tiles; ++a) {
    const int64_t last_of_a = first + (a + 1) * kTile < end ? first + (a + 1) * kTile - 1 : end - 1;
    const int64_t block = pattern.start(last_of_a);
    for (int b = a; b < tiles; ++b) {
      const int64_t first_of_b = first + b * kTile > begin ? first + b * kTile : begin;
      if (b > a && pattern.start(first_of_b) != block) break;
      shared_store(pairs + count++, pack_pair(a, b));
    }
  }
  return count;
}

template <class T, int kPanel, RowAccess kAccess>
__global__ __launch_bounds__(kGramThreads,
                             sizeof(T) == 8 ? 1 : 2) void block_gram_kernel(Task task) {
  using Tiles = GramTiles<T, void, kPanel, kAccess>;
  using A = typename Tiles::A;
  __shared__ int pairs[kMaxPairs], pair_count;
  const int64_t split = blockIdx.x / task.panels, panel = blockIdx.x % task.panels;
  const int64_t begin = panel * task.panel_columns;
  const int64_t end =
      begin + task.panel_columns < task.pattern.dim ? begin + task.panel_columns : task.pattern.dim;
  const int64_t first = begin / kVector<T> * kVector<T>;
  const int tiles = static_cast<int>((end - first + kTile - 1) / kTile);
  if (threadIdx.x == 0) pair_count = list_pairs(task.pattern, first, begin, end, tiles, pairs);
  __syncthreads();

  typename Tiles::Input in;
  in.x = task.x;
  in.panel_runs = {{first, 0}, {tiles, 0}};
  in.begin = task.sums.first_row + split * task.sums.rows;
  in.end = in.begin + task.sums.rows < task.x.count ? in.begin + task.sums.rows : task.x.count;
  in.pairs = pairs;
  in.pair_count = pair_count;
  in.row_groups = row_groups_for(pair_count, Tiles::kRowGroups);
  A* out = static_cast<A*>(task.sums.out) + split * task.sums.stride;
  Tiles::template run<true>(in, [&](int a, int b, int i, int j, A sum) {
    const int64_t row = first + a * kTile + i, column = first + b * kTile + j;
    if (row < begin || row >= end || column < begin || column >= end) return;
    const int64_t slot = task.pattern.slot(row, column);
    if (slot < 0) return;
    store(out + slot, task.sums.splits == 1 ? load(out + slot) + sum : sum);
  });
}

// The most whole factor blocks of which every panel fits its tiles, if possible a multiple of 16
// bytes; 0 if not even one block fits.
int64_t panel_columns(const BlockGram& gram) {
  const int64_t limit = (gram.narrow ? kNarrowPanel : kWidePanel) * kTile;
  const int64_t vector = 16 / size_of(gram.x.dtype);
  int64_t most = 0;
  for (int64_t columns = gram.block; columns <= limit; columns += gram.block) {
    int64_t step = vector;  // panels begin at multiples of it, within a vector
    while (columns % step != 0) step /= 2;
    if (step == vector || (columns + vector - step <= limit && most % vector != 0) || most == 0) {
      if (columns + vector - step <= limit) most = columns;
    }
  }
  return most;
}

template <class T, int kPanel, RowAccess kAccess>
void launch_block_gram(const Task& task, Stream stream) {
  launch(Launch{"block_gram", task.panels * task.sums.splits, kGramThreads, stream,
                GramTiles<T, void, kPanel, kAccess>::kSharedBytes},
         block_gram_kernel<T, kPanel, kAccess>, task);
}

}  // namespace

bool fits(const BlockGram& gram) { return panel_columns(gram) > 0; }

int64_t panels(const BlockGram& gram) {
  const int64_t columns = panel_columns(gram);
  return (gram.x.dim() + columns - 1) / columns;
}

void accumulate(const BlockGram& gram, const GramSums& sums, Stream stream) {
  Layout layout;
  layout.family = Family::kBlockDiagonal;
  layout.dim = gram.x.dim();
  layout.block = gram.block;
  const Task task{gram.x, BlockPattern(layout), panel_columns(gram),
                  static_cast<unsigned>(panels(gram)), sums};
  visit_type(gram.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    visit_access(gram.x.access, [&](auto access) {
      constexpr RowAccess kAccess = decltype(access)::value;
      if (gram.narrow) {
        launch_block_gram<T, kNarrowPanel, kAccess>(task, stream);
      } else {
        launch_block_gram<T, kWidePanel, kAccess>(task, stream);
      }
    });
  });
}

}  // namespace singd::cuda
