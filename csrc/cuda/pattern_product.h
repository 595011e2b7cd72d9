// Products of structured matrices, one thread an entry: for structures whose rows or columns are
// short, and for small dense factors (large ones: wide_blocks.h). `single` says float, else double.
#pragma once

#include "../structures/layout.h"
#include "arguments.h"

namespace singd::cuda {

// c = A B, all of this structure.
void pattern_product(const Layout& layout, int64_t size, bool single, const void* a, const void* b,
                     void* c, Stream stream);

// h = Pi(K^T K).
void pattern_gram(const Layout& layout, int64_t size, bool single, const void* k, void* h,
                  Stream stream);

}  // namespace singd::cuda
