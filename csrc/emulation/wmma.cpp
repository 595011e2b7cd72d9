#include "wmma.h"

namespace singd::emulation {

void multiply_accumulate(Matrix& d, const Matrix& a, const Matrix& b, const Matrix& c) {
  Matrix sum;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) sum[i][j] = c[i][j];
    for (int k = 0; k < 16; ++k) {
      const float factor = a[i][k];
      for (int j = 0; j < 16; ++j) sum[i][j] += factor * b[k][j];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) d[i][j] = sum[i][j];
  }
}

}  // namespace singd::emulation
