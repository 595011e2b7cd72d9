// The panels in which a step reads and writes a layer.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace singd::cpu {

struct PanelSize {
  int64_t rows, columns;
};

template <class T>
class Panels {
 public:
  // Pointwise layers have no products.
  static PanelSize to_write(const StepLayer<T>& layer, bool pointwise) {
    const int64_t row_unit = unit(layer.left), column_unit = unit(layer.right);
    const bool tiles = layer.left.has_planes();
    const int64_t some_rows = pointwise ? 1 : tiles ? kTilePanelRows : kPanelRows;
    const int64_t least_rows = tiles ? std::max<int64_t>(1, some_rows / row_unit) * row_unit
                                     : (some_rows + row_unit - 1) / row_unit * row_unit;
    int64_t width = layer.columns;
    if (!layer.right.has_border()) {
      const int64_t columns = (pointwise ? kPointwisePanel : kWidePanel) / least_rows;
      width = std::min(width, std::max(column_unit, columns / column_unit * column_unit));
    }
    int64_t elements = pointwise ? kPointwisePanel : kPanel;
    if (layer.right.has_border() && layer.right.border() > kPanelRows) {
      elements = std::max(elements, std::min(kBorderPanelRows * width, kBorderPanel));
    }
    const int64_t rows = std::max(elements / width / some_rows, int64_t{1}) * some_rows;
    const int64_t height = (rows + row_unit - 1) / row_unit * row_unit;
    return {height, width};
  }

  // Whole rows, as they lie in memory. Each task of thin products has sums of its own, so there are
  // few of them; how many does not depend on the threads, so that the bits do not either.
  static int64_t rows_to_read(const StepLayer<T>& layer) {
    if (!layer.left.has_border()) return std::max<int64_t>(1, kPointwisePanel / layer.columns);
    const int64_t share = (layer.rows + kMostThinTasks - 1) / kMostThinTasks;
    return std::max(kLeastThinRows, whole_depths(share));
  }

 private:
  // Elements of a panel: with products two of them fit the first cache, or with blocks on the left,
  // which need many rows, the second, so that rows are long pieces. Without products none is
  // visited twice; taking a task waits for all that was stored past the caches, so these are
  // larger.
  static constexpr int64_t kPointwisePanel = 16384, kPanel = 8192, kWidePanel = 32768;
  static constexpr int64_t kPanelRows = 12, kTilePanelRows = 32;
  // Every panel reads all of a border on the right: where that has more rows, panels are higher, as
  // long as the second cache has them.
  static constexpr int64_t kBorderPanelRows = 36, kBorderPanel = int64_t{1} << 17;
  static constexpr int64_t kLeastThinRows = 128, kMostThinTasks = 4;

  static int64_t unit(const LocalProduct<T>& product) {
    return product.kind == LocalKind::kBlocks ? product.layout.block : 1;
  }
};

}  // namespace singd::cpu
