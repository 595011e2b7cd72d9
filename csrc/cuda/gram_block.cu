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

// A panel as it is staged: column c of the stage is column `first` + c of X.
struct Panel {
  int64_t begin;    // of the factor blocks
  int64_t first;    // begin, at a 16-byte step of the row
  int margin;       // begin - first
  int columns;      // staged
  int block, left;  // the width of a factor block; columns of X from `first` on

  __device__ Panel(const Task& task, int64_t number, int vector) {
    begin = number * task.panel_columns;
    first = begin / vector * vector;
    margin = static_cast<int>(begin - first);
    block = static_cast<int>(task.pattern.block);
    left = static_cast<int>(task.pattern.dim - first);
    columns = static_cast<int>(task.panel_columns) + margin;
    if (columns > left) columns = left;
  }

  __device__ int tiles() const { return (columns + kTile - 1) / kTile; }
  __device__ bool contains(int c) const { return c >= margin && c < columns; }
  // The first column of the factor block of column c.
  __device__ int start(int c) const {
    return margin +
           static_cast<int>(static_cast<unsigned>(c - margin) / static_cast<unsigned>(block)) *
               block;
  }
  // Entry (c, column) of the factor block is row(c) + column in the panel's part of the storage.
  __device__ int row(int c) const {
    const int first_column = start(c);
    const int width = block < left - first_column ? block : left - first_column;
    return (first_column - margin) * block + (c - first_column) * width - first_column;
  }
  // The last tile that a factor block of tile a meets.
  __device__ int last_tile(int a) const {
    const int last = (a + 1) * kTile < columns ? (a + 1) * kTile - 1 : columns - 1;
    const int end = start(last) + block;
    return ((end < columns ? end : columns) - 1) / kTile;
  }
};

// The pairs a <= b of tiles of the panel that some factor block meets both of, listed by the first
// threads of the block, one for each a; their number. Ends with a barrier.
__device__ __forceinline__ int list_pairs(const Panel& panel, int* pairs, int* count) {
  const int a = threadIdx.x, tiles = panel.tiles();
  if (a < tiles) {
    int slot = 0;
#pragma unroll 1
    for (int before = 0; before < a; ++before) slot += panel.last_tile(before) - before + 1;
    const int last = panel.last_tile(a);
#pragma unroll 1
    for (int b = a; b <= last; ++b) shared_store(pairs + slot++, pack_pair(a, b));
    if (a == tiles - 1) shared_store(count, slot);
  }
  __syncthreads();
  return shared_load(count);
}

template <class T, int kPanel, RowAccess kAccess>
__global__ __launch_bounds__(kGramThreads,
                             sizeof(T) == 8 ? 1 : 2) void block_gram_kernel(Task task) {
  using Tiles = GramTiles<T, void, kPanel, kAccess>;
  using A = typename Tiles::A;
  __shared__ int pairs[kMaxPairs], pair_count;
  __shared__ Vec<int, 2> columns[kPanel * kTile];  // start of the factor block, and row()
  const int64_t split = blockIdx.x / task.panels;
  const Panel panel(task, blockIdx.x % task.panels, kVector<T>);

  typename Tiles::Input in;
  in.x = &task.x;
  in.panel_runs = {{panel.first, 0}, {panel.tiles(), 0}};
  in.begin = task.sums.first_row + split * task.sums.rows;
  in.end = in.begin + task.sums.rows < task.x.count ? in.begin + task.sums.rows : task.x.count;
  in.pairs = pairs;
  const auto list = [&] {
    const int c = threadIdx.x;
    if (c < kPanel * kTile) {
      const int start = panel.contains(c) ? panel.start(c) : -1;
      shared_store(columns + c, Vec<int, 2>{{start, panel.row(c)}});
    }
    return list_pairs(panel, pairs, &pair_count);
  };
  const bool adds = task.sums.splits == 1;
  A* const out =
      static_cast<A*>(task.sums.out) + split * task.sums.stride + panel.begin * panel.block;
  Tiles::template run<true>(in, list, [&](int a, int b, int j) {
    const int column = b * kTile + j;
    const int start = shared_load(columns + column)[0];
    A* const to_column = out + column;
    return [=](int i, A sum) {
      const Vec<int, 2> row = shared_load(columns + a * kTile + i);
      if (row[0] != start || start < 0) return;
      A* const to = to_column + row[1];
      store(to, adds ? load(to) + sum : sum);
    };
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
