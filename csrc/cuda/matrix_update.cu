// The fused step of layers with a block-diagonal or bordered side on the tensor cores, for float32
// and 16-bit layers that move in vectors:
//
//   Z = G A_K    P = A_C Z    M <- alpha2 M + P + gamma W    W <- W - lr M
//
// A tile (matrix_tile.cuh) is whole blocks of C high and whole blocks of K wide. Numbers are split
// into planes of bfloat16 (planes.cuh): 16-bit layers are computed to about 2^-16, float32 ones to
// 2^-24.
//
// Bytes: G, M, W read once and M, W written once (5 passes over DRAM): the same launch inspects G
// before, and reads it again from L2. Of operands a tile reads at most 64 bytes for each of its
// columns and 16 steps, and half of that for its rows, from L2.
#include "matrix_operands.cuh"
#include "matrix_tile.cuh"
#include "step_work.cuh"

namespace singd::cuda {
namespace {

constexpr int kTilesPerInspection = 2;

constexpr int kItemsAtOnce = kStepThreads / kWarp;

// A layer's first pieces of work: those that make operands, then, without a border, those that
// inspect G.
SINGD_HOST_DEVICE inline int operand_pieces(const MatrixOffsets& operands) {
  return (operands.items() + kItemsAtOnce - 1) / kItemsAtOnce;
}

template <class E>
__device__ __forceinline__ void make_operands(const StepArguments& a, const StepLayer& l,
                                              const OperandMaker<E>& maker, int piece) {
  if (piece == 0 && threadIdx.x == 0) write_tile_layer(a, l);
  const int item = piece * kItemsAtOnce + static_cast<int>(threadIdx.x) / kWarp;
  maker.make(item);
}

// The last block of a layer discards the operands, which L2 need not write to memory then.
__device__ __forceinline__ void finish_update(const StepArguments& a, const StepLayer& l) {
  constexpr int kLineFloats = 128 / sizeof(float);
  __shared__ int before;
  __syncthreads();
  if (threadIdx.x == 0) {
    shared_store(&before, add_release(counters_of(a, l) + kUpdatesFinished, 1));
  }
  __syncthreads();
  if (shared_load(&before) + 1 < l.updates()) return;
  auto* const begin = static_cast<float*>(l.workspace) + StepOffsets(l).size;
  auto* const end = begin + MatrixOffsets(l).size;
  const auto misaligned = reinterpret_cast<uintptr_t>(begin) / sizeof(float) % kLineFloats;
  auto* line = begin + (misaligned == 0 ? 0 : kLineFloats - misaligned) + threadIdx.x * kLineFloats;
  for (; line + kLineFloats <= end; line += kStepThreads * kLineFloats) discard(line);
}

template <class E, class Kind>
__device__ __forceinline__ void update_tiles(const StepArguments& a, const StepLayer& l,
                                             int64_t group) {
  auto* const layer =
      reinterpret_cast<TileLayer*>(dynamic_shared<bfloat16>() + TileShape<E, Kind>::kSize);
  copy_tile_layer(l, layer);
  const int first = static_cast<int>(group) * kMatrixTilesAtOnce;
  const int end = min(first + kMatrixTilesAtOnce, static_cast<int>(l.tiles()));
  for (int number = first; number < end; ++number) {
    __syncthreads();  // the layer is written, and the tile before read
    TileUpdate<E, Kind>(l, *layer, number).run(number + 1 < end);
  }
  finish_update(a, l);
}

template <class E, class Kind>
__global__ void __launch_bounds__(kStepThreads, 2)
    matrix_update_kernel(const __grid_constant__ StepTable table, const StepArguments a,
                         int* ticket) {
  const Work work = work_of(table, take_ticket(ticket));
  const StepLayer& l = *work.layer;
  if (!work.first) {
    ask_for_tile<E>(l, tile_of<E>(l, work.tile * kMatrixTilesAtOnce));
    if (begin_update<float>(a, work)) update_tiles<E, Kind>(a, l, work.tile);
    return;
  }
  const OperandMaker<E> maker(l);
  const int64_t pieces = operand_pieces(maker.operands);
  if (work.tile < pieces) {
    make_operands<E>(a, l, maker, static_cast<int>(work.tile));
  } else {
    const int64_t begin = (work.tile - pieces) * kTilesPerInspection;
    for (int64_t n = begin; n < min(begin + kTilesPerInspection, l.tiles()); ++n) {
      inspect<E>(a, l, tile_of<E>(l, n));
    }
  }
  finish_first_tile(a, l);
}

// f(TileKind<...>{}). Tiles are wide for the sake of blocks of K.
template <class Function>
void dispatch_kinds(const StepKind& kind, bool stochastic, Function&& f) {
  const auto with = [](bool flag, auto&& next) {
    flag ? next(std::true_type{}) : next(std::false_type{});
  };
  with(stochastic, [&](auto rounding) {
    with(kind.left_blocks, [&](auto left) {
      if (!kind.right_blocks) return f(TileKind<false, left(), false, rounding()>{});
      with(kind.wide_tiles, [&](auto wide) { f(TileKind<true, left(), wide(), rounding()>{}); });
    });
  });
}

// Columns of a tile that is at most so wide: whole blocks, if possible whole vectors; 0 if not one
// block fits.
int64_t tile_columns(const StepLayer& l, int64_t most, int64_t vector) {
  if (l.right.action != Action::kBlocks) return std::min<int64_t>(most, padded(l.columns));
  const int64_t width = l.right.width;
  int64_t unit = width;
  while (unit % vector != 0 && unit <= most) unit += width;
  if (unit <= most) return most / unit * unit;
  return (most - (vector - 1)) / width * width;
}

// Height and width of the tiles, which end where sectors do; both 0 if there are none such.
struct Extent {
  int64_t rows = 0, columns = 0;
};

Extent extent_of(const StepLayer& l, Dtype element) {
  constexpr int64_t kSector = 32;
  const int64_t bytes = size_of(element);
  const int64_t width = l.left.action == Action::kBlocks ? l.left.width : 1;
  for (const int64_t rows : {64, 32}) {
    const int64_t columns = tile_columns(l, kTileElements / rows, 16 / bytes);
    const bool ends = columns >= l.columns || columns * bytes % kSector == 0;
    if (columns > 0 && ends && width <= rows) return {rows / width * width, columns};
  }
  return {};
}

}  // namespace

bool fits_matrix_update(const StepLayer& layer, const StepKind& kind) {
  if (!kind.in_vectors || kind.element == Dtype::kFloat64) return false;
  return extent_of(layer, kind.element).columns > 0;
}

void plan_matrix_update(StepLayer& layer, const StepKind& kind) {
  const Extent extent = extent_of(layer, kind.element);
  layer.tile_rows = static_cast<int16_t>(extent.rows);
  layer.tile_columns = static_cast<int16_t>(extent.columns);
  dispatch_vectors(kind, [&](auto elements) {
    layer.planes = kComputePlanes<typename decltype(elements)::Stored>;
  });
  layer.first_tiles = operand_pieces(MatrixOffsets(layer));
  if (layer.left.bordered() || layer.right.bordered()) return;
  layer.first_tiles +=
      static_cast<int32_t>((layer.tiles() + kTilesPerInspection - 1) / kTilesPerInspection);
}

void matrix_update(StepLayer* layers, int count, const StepKind& kind, const StepArguments& a,
                   int* ticket, Stream stream) {
  StepTable table;
  const int64_t blocks = fill_work(table, layers, count);
  dispatch_vectors(kind, [&](auto elements) {
    using E = decltype(elements);
    constexpr bool kRounds = std::is_same_v<typename E::Stored, bfloat16>;
    dispatch_kinds(kind, kRounds && a.key.enabled, [&](auto flags) {
      using Kind = decltype(flags);
      if constexpr (kRounds || !Kind::kStochastic) {
        const size_t bytes = TileShape<E, Kind>::kSize * sizeof(bfloat16) + sizeof(TileLayer);
        launch({"matrix_update", blocks, kStepThreads, stream, bytes},
               matrix_update_kernel<E, Kind>, table, a, ticket);
      }
    });
  });
}

}  // namespace singd::cuda
