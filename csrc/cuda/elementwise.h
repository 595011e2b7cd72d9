// Between dense matrices and structured storage, entry by entry.
#pragma once

#include "../structures/layout.h"
#include "arguments.h"

namespace singd::cuda {

// A dense matrix of any strides (in elements).
struct DenseMatrix {
  const void* data;
  int64_t row_stride, column_stride;
};

// storage = Pi(S) for a symmetric S.
void project(const Layout& layout, Dtype dtype, const DenseMatrix& symmetric, void* storage,
             Stream stream);

// storage = the entries of the matrix on the pattern of K, without weights; of a Toeplitz pattern,
// the last entry of each diagonal.
void extract(const Layout& layout, Dtype dtype, const DenseMatrix& matrix, void* storage,
             Stream stream);

// The contiguous dim x dim matrix that the storage stands for, zeros included; it starts at a
// multiple of 16 bytes.
void to_dense(const Layout& layout, Dtype dtype, const void* storage, void* matrix, Stream stream);

}  // namespace singd::cuda
