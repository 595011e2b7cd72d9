// Lists of layers as kernel arguments: no copy to the device, no lifetime to manage, and safe in a
// captured graph. A block finds its item by a binary search over the items' first blocks.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace singd::cuda {

// Item has a member `int64_t first_block`, ascending, 0 for the first one.
template <class Item, int kCapacity>
struct Table {
  int count;
  Item items[kCapacity];

  // The last item whose first block is not beyond `block`.
  __device__ const Item& find(int64_t block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (items[middle].first_block <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return items[low];
  }
};

}  // namespace singd::cuda
