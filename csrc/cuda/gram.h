// Entries of Gram matrices X^T X on the pattern of a structure, for rows X [m, d] (rows.h).
#pragma once

#include <cstdint>

#include "arguments.h"
#include "rows.h"

namespace singd::cuda {

// The rows first_row ... x.count - 1 are split over blocks: split s takes `rows` rows from
// first_row + s * rows and writes its sums to out + s * stride. One split adds its sums to `out`.
struct GramSums {
  int64_t first_row, splits, rows;
  void* out;  // float64 for float64 rows, float32 otherwise
  int64_t stride;
};

// Block-diagonal: the storage of csrc/structures/block_diagonal.h.
struct BlockGram {
  Rows x;
  int64_t block;
  bool narrow = false;  // panels of up to 64 columns instead of 128
};
bool fits(const BlockGram& gram);
int64_t panels(const BlockGram& gram);
void accumulate(const BlockGram& gram, const GramSums& sums, Stream stream);

// Bordered: the storage of csrc/structures/bordered.h. The border columns are those of X itself,
// or (border.data not null) the columns of another matrix of as many rows, in the compute type of
// X; column j of X is then multiplied by scale[j - head], and border columns of X are left out.
// With `packed`, x is that other matrix too.
struct BorderedGram {
  Rows x, border;
  int64_t dim, head, tail;
  const void* scale = nullptr;
  bool packed = false;
  bool narrow = false;
};
bool fits(const BorderedGram& gram);
int64_t panels(const BorderedGram& gram);
void accumulate(const BorderedGram& gram, const GramSums& sums, Stream stream);

// out[r - first_row, c] = sum_j x[r, j] e[c, j] for rows r from first_row on: the border columns of
// X K, for e [b, d] of the compute type of x, b <= 64. A row of `out` has border_width(b) entries,
// a multiple of 16 bytes with zeros at the end.
int64_t border_width(int64_t border);
void border_product(const Rows& x, const void* e, int64_t border, int64_t first_row, void* out,
                    Stream stream);
bool border_product_is_narrow(const Rows& x, int64_t border);
void border_product_narrow(const Rows& x, const void* e, int64_t border, int64_t first_row,
                           void* out, Stream stream);
void border_product_bfloat16(const Rows& x, const float* e, int64_t border, int64_t first_row,
                             float* out, Stream stream);

}  // namespace singd::cuda
