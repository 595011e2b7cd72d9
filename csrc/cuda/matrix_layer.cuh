// What all tiles of matrix_update share of a layer. It is written to the head of the layer's
// operands, and a block that writes tiles copies it to shared memory and reads what it needs
// where it needs it: in registers it would take half of them, and to compute it takes longer than a
// tile.
#pragma once

#include "matrix_operands.h"
#include "step.cuh"

namespace singd::cuda {

struct TileLayer {
  Update<float> update;
  MatrixOffsets operands;
  StepRanges right, left;
  const float *right_delta, *left_delta, *products, *thin_result, *prepared;
  void *weight, *momentum;
  const void* gradient;
  int weight_columns, gradient_pitch, gradient_in_vectors;
  int rows, columns, tile_rows, tile_columns, across;  // across: tiles

  __device__ TileLayer(const StepArguments& a, const StepLayer& l)
      : update(a, l), operands(l), right(l.right), left(l.left) {
    const StepOffsets offsets(l);
    const auto* const workspace = static_cast<const float*>(l.workspace);
    right_delta = workspace + offsets.right_delta;
    left_delta = workspace + offsets.left_delta;
    products = workspace + offsets.products;
    thin_result = workspace + offsets.thin_result;
    prepared = workspace + offsets.size;
    weight = l.weight;
    momentum = l.momentum_weight;
    gradient = l.gradient;
    weight_columns = l.weight_columns();
    gradient_pitch = l.gradient_pitch;
    gradient_in_vectors = l.gradient_in_vectors;
    rows = l.rows;
    columns = l.columns;
    tile_rows = l.tile_rows;
    tile_columns = l.tile_columns;
    across = l.column_tiles();
  }
};
static_assert(sizeof(TileLayer) <= kHeadFloats * sizeof(float));

// To its place in the workspace.
__device__ __forceinline__ void write_tile_layer(const StepArguments& a, const StepLayer& l) {
  const TileLayer layer(a, l);
  constexpr int kWords = sizeof(TileLayer) / sizeof(float);
  float words[kWords];
  memcpy(words, static_cast<const void*>(&layer), sizeof words);
  auto* const to = const_cast<float*>(layer.prepared);
#pragma unroll
  for (int n = 0; n < kWords; ++n) store(to + n, words[n]);
}

// To shared memory, by a block of at least kHeadFloats threads.
__device__ __forceinline__ void copy_tile_layer(const StepLayer& l, TileLayer* to) {
  const int word = threadIdx.x;
  if (word >= static_cast<int>(sizeof(TileLayer) / sizeof(float))) return;
  const float* const from = static_cast<const float*>(l.workspace) + StepOffsets(l).size;
  shared_store(reinterpret_cast<float*>(to) + word, load(from + word));
}

}  // namespace singd::cuda
