// A strided view of one matrix, or of a batch of equal ones, that products read and write.
#pragma once

#include <cstdint>

namespace singd {

template <class T>
struct MatrixView {
  T* data;
  int64_t row_stride;
  int64_t column_stride = 1;
  int64_t batch_stride = 0;

  MatrixView transpose() const { return {data, column_stride, row_stride, batch_stride}; }
  MatrixView transpose_if(bool condition) const { return condition ? transpose() : *this; }
};

}  // namespace singd
