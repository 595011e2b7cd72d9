// The emulator's nvcuda::wmma: products, missing synchronisation, mistaken calls.
#include <cmath>
#include <string>
#include <vector>

#include "../cuda/launch.cuh"
#include "../cuda/numeric.cuh"
#include "../emulation/emulator.h"
#include "check.h"
#include "emulated.h"

namespace singd::cuda {

using emulation::Error;
using tests::check;
using tests::check_close;
using tests::check_throws;
using tests::for_seeds;
using tests::lane;

namespace {

// y = x x^T for x of 16 x `columns`; the halves of a warp fill and read the tile.
template <class T, bool kSync>
__global__ void gram(const T* x, int columns, float* y) {
  namespace wmma = nvcuda::wmma;
  __shared__ __align__(32) T tile[16 * 24];
  __shared__ __align__(32) float result[16 * 20];
  wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(sum, 0.0f);
  for (int first = 0; first < columns; first += 16) {
    for (int i = lane(); i < 256; i += kWarp) {
      shared_store(tile + i / 16 * 24 + i % 16, load(x + i / 16 * columns + first + i % 16));
    }
    __syncwarp();
    wmma::load_matrix_sync(a, tile, 24);
    wmma::load_matrix_sync(b, tile, 24);
    if (kSync) __syncwarp();
    wmma::mma_sync(sum, a, b, sum);
  }
  wmma::store_matrix_sync(result, sum, 20, wmma::mem_row_major);
  __syncwarp();
  for (int i = lane(); i < 256; i += kWarp) {
    store(y + i, shared_load(result + i / 16 * 20 + i % 16));
  }
}

template <class T, bool kSync>
double gram_error() {
  constexpr int kColumns = 64;
  std::vector<T> x(16 * kColumns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = T(0.37f * static_cast<float>(i * 7 % 23) - 3.0f);
  std::vector<float> y(256);
  launch({"gram", 1, 32, nullptr}, gram<T, kSync>, x.data(), kColumns, y.data());
  double error = 0;
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 16; ++j) {
      double sum = 0;
      for (size_t k = 0; k < kColumns; ++k) {
        sum += static_cast<double>(widen<float>(x[i * kColumns + k])) *
               static_cast<double>(widen<float>(x[j * kColumns + k]));
      }
      const double difference = std::abs(sum - static_cast<double>(y[i * 16 + j]));
      error = difference <= error ? error : difference;  // NaN is an error
    }
  }
  return error;
}

void test_wmma() {
  int found = 0;
  for_seeds([&](const std::string& seed) {
    check_close(gram_error<bfloat16, true>(), 0, 1e-3, "wmma, bfloat16, " + seed);
    check_close(gram_error<float16, true>(), 0, 1e-3, "wmma, float16, " + seed);
    found += !(gram_error<bfloat16, false>() < 1e-3);
  });
  check(found > 0, "some seed finds the missing __syncwarp");
}

enum class Mistake { kPointer, kRows, kEmpty, kSomeLanes };

__global__ void mistaken_wmma(Mistake mistake) {
  namespace wmma = nvcuda::wmma;
  bfloat16* tile = dynamic_shared<bfloat16>();
  wmma::fragment<wmma::matrix_a, 16, 16, 16, bfloat16, wmma::row_major> a;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  if (mistake == Mistake::kPointer) wmma::load_matrix_sync(a, tile + 8, 16);
  if (mistake == Mistake::kRows) wmma::load_matrix_sync(a, tile, 20);
  if (mistake == Mistake::kEmpty) {
    wmma::store_matrix_sync(dynamic_shared<float>(), sum, 16, wmma::mem_row_major);
  }
  if (mistake == Mistake::kSomeLanes && lane() < 7) wmma::load_matrix_sync(a, tile, 16);
}

void test_mistaken_wmma() {
  const auto fails = [](Mistake mistake, const std::string& text) {
    check_throws<Error>([&] { launch({"wmma", 1, 32, nullptr, 1024}, mistaken_wmma, mistake); },
                        text, "wmma");
  };
  fails(Mistake::kPointer, "not a multiple of 32 bytes");
  fails(Mistake::kRows, "not a multiple of 16 bytes");
  fails(Mistake::kEmpty, "before it is filled");
  fails(Mistake::kSomeLanes, "thread 7 made 0 calls of wmma, lane 0 of its warp 1");
}

}  // namespace

}  // namespace singd::cuda

int main() {
  using namespace singd::cuda;
  test_wmma();
  test_mistaken_wmma();
  return singd::tests::failures;
}
