// nvcuda::wmma for 16 x 16 x 16 products of half or bfloat16 matrices with float accumulators.
//
// Lane 0 holds each fragment as a whole and carries out every operation when it gets there; the
// other lanes go on at once. So the order in which lanes reach an operation is the only order there
// is, and a __syncwarp that is missing between other lanes' shared memory accesses and an operation
// shows. What lies where in a fragment is unspecified, so fragments here have no elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "counters.h"
#include "emulator.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  static_assert(std::is_same_v<Use, accumulator>
                    ? std::is_same_v<T, float>
                    : std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  bool filled = false;
  float matrix[16][16];  // what half and bfloat16 hold is exact in float
};

}  // namespace nvcuda::wmma

namespace singd::emulation {

using Matrix = float[16][16];

// d = a b + c
void multiply_accumulate(Matrix& d, const Matrix& a, const Matrix& b, const Matrix& c);

constexpr uintptr_t kMatrixAlignment = 32;
constexpr unsigned kMatrixRowAlignment = 16;

template <class T>
void check_matrix(const T* p, unsigned stride) {
  if (reinterpret_cast<uintptr_t>(p) % kMatrixAlignment != 0) {
    fail("a matrix of wmma at an address that is not a multiple of 32 bytes");
  }
  if (stride * sizeof(T) % kMatrixRowAlignment != 0) {
    fail("rows of wmma that are " + std::to_string(stride) +
         " elements apart, which is not a multiple of 16 bytes");
  }
}

inline void check_filled(bool filled) {
  if (!filled) fail("a fragment of wmma is used before it is filled");
}

template <class T>
void load_matrix(Matrix& matrix, const T* p, unsigned stride, bool by_rows) {
  check_matrix(p, stride);
  if (counting) count_matrix(p, sizeof(T) * 16, sizeof(T) * stride, false);
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned j = 0; j < 16; ++j) {
      const float value = static_cast<float>(p[i * stride + j]);
      (by_rows ? matrix[i][j] : matrix[j][i]) = value;
    }
  }
}

}  // namespace singd::emulation

namespace nvcuda::wmma {

using singd::emulation::Site;

template <class T>
void fill_fragment(fragment<accumulator, 16, 16, 16, T>& f, float value, Site site = Site::here()) {
  if (!singd::emulation::matrix_call(nullptr, site)) return;
  for (auto& row : f.matrix) {
    for (float& element : row) element = value;
  }
  f.filled = true;
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* p, unsigned ldm,
                      Site site = Site::here()) {
  static_assert(!std::is_same_v<Use, accumulator>);
  if (!singd::emulation::matrix_call(p, site)) return;
  singd::emulation::load_matrix(f.matrix, p, ldm, std::is_same_v<Layout, row_major>);
  f.filled = true;
}

template <class T>
void load_matrix_sync(fragment<accumulator, 16, 16, 16, T>& f, const T* p, unsigned ldm,
                      layout_t layout, Site site = Site::here()) {
  if (!singd::emulation::matrix_call(p, site)) return;
  singd::emulation::load_matrix(f.matrix, p, ldm, layout == mem_row_major);
  f.filled = true;
}

template <class T>
void store_matrix_sync(T* p, const fragment<accumulator, 16, 16, 16, T>& f, unsigned ldm,
                       layout_t layout, Site site = Site::here()) {
  using namespace singd::emulation;
  if (!matrix_call(p, site)) return;
  check_filled(f.filled);
  check_matrix(p, ldm);
  if (counting) count_matrix(p, sizeof(T) * 16, sizeof(T) * ldm, true);
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned j = 0; j < 16; ++j) {
      p[i * ldm + j] = layout == mem_row_major ? f.matrix[i][j] : f.matrix[j][i];
    }
  }
}

template <class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d,
              const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, float>& c, Site site = Site::here()) {
  using namespace singd::emulation;
  if (!matrix_call(nullptr, site)) return;
  check_filled(a.filled && b.filled && c.filled);
  multiply_accumulate(d.matrix, a.matrix, b.matrix, c.matrix);
  d.filled = true;
}

}  // namespace nvcuda::wmma
