// The emulator's matrix products: layouts, missing synchronisation, mistaken calls.
#include <cmath>
#include <string>
#include <vector>

#include "../cuda/launch.cuh"
#include "../cuda/matrix.cuh"
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

constexpr int kPitch = 24;

// y = a b of 16 x 16 matrices; each of them is stored transposed where its parameter says so.
template <class T, bool kLeft, bool kRight, bool kSync>
__global__ void product(const T* a, const T* b, float* y) {
  __shared__ __align__(32) T tiles[2][16 * kPitch];
  for (int i = lane(); i < 256; i += kWarp) {
    shared_store(tiles[0] + i / 16 * kPitch + i % 16, load(a + i));
    shared_store(tiles[1] + i / 16 * kPitch + i % 16, load(b + i));
  }
  if (kSync) __syncwarp();
  MatrixOperand<T> left, right;
  load_left<kLeft>(left, tiles[0], kPitch);
  load_right<kRight>(right, tiles[1], kPitch);
  MatrixSums sums;
  multiply(sums, left, right);
  for (int e = 0; e < 8; ++e) {
    store(y + matrix_row(lane(), e) * 16 + matrix_column(lane(), e), sums.values[e]);
  }
}

template <class T, bool kLeft, bool kRight, bool kSync = true>
double error() {
  std::vector<T> a(256), b(256);
  for (size_t i = 0; i < 256; ++i) {
    a[i] = T(static_cast<float>(i * 7 % 23) - 11.0f);
    b[i] = T(static_cast<float>(i * 5 % 19) - 9.0f);
  }
  std::vector<float> y(256);
  launch({"product", 1, 32, nullptr}, product<T, kLeft, kRight, kSync>, a.data(), b.data(),
         y.data());
  double error = 0;
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 16; ++j) {
      double sum = 0;
      for (size_t k = 0; k < 16; ++k) {
        const T x = a[kLeft ? k * 16 + i : i * 16 + k], z = b[kRight ? j * 16 + k : k * 16 + j];
        sum += static_cast<double>(widen<float>(x)) * static_cast<double>(widen<float>(z));
      }
      const double difference = std::abs(sum - static_cast<double>(y[i * 16 + j]));
      error = difference <= error ? error : difference;  // NaN is an error
    }
  }
  return error;
}

void test_products() {
  int found = 0;
  for_seeds([&](const std::string& seed) {
    check_close(error<bfloat16, false, false>(), 0, 1e-9, "A B, " + seed);
    check_close(error<bfloat16, true, false>(), 0, 1e-9, "A^T B, " + seed);
    check_close(error<float16, false, true>(), 0, 1e-9, "A B^T, " + seed);
    check_close(error<float16, true, true>(), 0, 1e-9, "A^T B^T, " + seed);
    found += !(error<bfloat16, false, false, false>() < 1e-9);
  });
  check(found > 0, "some seed finds the missing __syncwarp");
}

enum class Mistake { kPointer, kRows, kOutside, kSomeLanes };

__global__ void mistaken(Mistake mistake) {
  bfloat16* tile = dynamic_shared<bfloat16>();
  MatrixOperand<bfloat16> a = {};
  MatrixSums sums;
  if (mistake == Mistake::kPointer) load_left<false>(a, tile + 4, 16);
  if (mistake == Mistake::kRows) load_left<false>(a, tile, 20);
  if (mistake == Mistake::kOutside) load_right<true>(a, tile + 512, 16);
  if (mistake == Mistake::kSomeLanes && lane() < 7) multiply(sums, a, a);
}

void test_mistakes() {
  const auto fails = [](Mistake mistake, const std::string& text) {
    check_throws<Error>([&] { launch({"matrix", 1, 32, nullptr, 1024}, mistaken, mistake); }, text,
                        "matrix");
  };
  fails(Mistake::kPointer, "not aligned to 16 bytes");
  fails(Mistake::kRows, "not aligned to 16 bytes");
  fails(Mistake::kOutside, "outside of the block's shared memory");
  fails(Mistake::kSomeLanes, "for ever");
}

}  // namespace

}  // namespace singd::cuda

int main() {
  using namespace singd::cuda;
  test_products();
  test_mistakes();
  return singd::tests::failures;
}
