// The products on AMX tiles, with tiles that are emulated: all of csrc/cpu/simd_amx.cpp but the
// instructions themselves, which the Python tests run where the processor has them. And the
// statistics of csrc/cpu/simd_bfloat16.cpp, which Intel's processors have but leave to others.
#define SINGD_EMULATED_TILES 1
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "../cpu/simd_bfloat16.cpp"
// Behind the kernels without tiles.
#include "../cpu/simd_amx.cpp"
#include "../structures/spec.h"
#include "check.h"

#if defined(__x86_64__)
namespace {

using namespace singd;
using namespace singd::cpu;
using namespace amx;
using namespace singd::tests;

constexpr double kPlanes = 1.0 / (1 << 15);    // of the sum of |terms|, twice what is left out
constexpr double kRounding = 1.0 / (1 << 20);  // rounded sums of float32

struct Matrix {
  int64_t rows, columns, stride;
  std::vector<float> numbers;

  Matrix(int64_t r, int64_t c, int64_t s, int64_t more_rows = 0)
      : rows(r), columns(c), stride(s), numbers(static_cast<size_t>((r + more_rows) * s)) {}
  float* data() { return numbers.data(); }
  float& at(int64_t i, int64_t j) { return numbers[static_cast<size_t>(i * stride + j)]; }
};

uint32_t state = 1;
float random_number() {
  state = state * 1664525 + 1013904223;
  return static_cast<float>(state >> 8) / (1 << 24) - 0.5f;
}
float rounded(float x) { return widen(Narrow<BFloat16>::of(x)); }

void fill(Matrix& m, bool exact = false) {
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.columns; ++j) {
      m.at(i, j) = exact ? rounded(random_number()) : random_number();
    }
  }
}

// Of C against scale * old C + A B.
void compare(Matrix& c, Matrix& old, double scale, Matrix& a, Matrix& b, const std::string& what) {
  double worst = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.columns; ++j) {
      double sum = scale * old.at(i, j), size = std::abs(sum);
      for (int64_t p = 0; p < a.columns; ++p) {
        const double term = double(a.at(i, p)) * b.at(p, j);
        sum += term;
        size += std::abs(term);
      }
      worst = std::max(worst, std::abs(c.at(i, j) - sum) / size);
    }
  }
  check(worst <= kPlanes, what + ": error " + std::to_string(worst));
}

void products(int64_t rows, int64_t columns, int64_t depth) {
  const std::string what =
      std::to_string(rows) + " x " + std::to_string(depth) + " x " + std::to_string(columns);
  const int64_t wide = padded(columns), deep = whole_depths(depth);
  std::vector<float> scale(static_cast<size_t>(wide), 0.75f);
  for (const bool exact : {false, true}) {
    Matrix a(rows, depth, deep, whole_depths(rows) - rows), b(depth, columns, wide);
    Matrix old(rows, columns, wide, 15);
    fill(a);
    fill(b, exact);
    fill(old);
    Matrix kept = a, row = a, c = old;
    split_left(kept.data(), whole_depths(rows), deep, row.data());
    const Planes planes = left_planes(kept.data(), deep);
    const auto run = [&](Before<float> before) {
      c = old;
      multiply_tiles_from_left(rows, wide, depth, planes, b.data(), wide, exact, c.data(), wide,
                               before);
    };
    run(kOverwrite<float>);
    compare(c, old, 0, a, b, "from the left " + what);
    run(kAdd<float>);
    compare(c, old, 1, a, b, "from the left, added, " + what);
    run({true, scale.data()});
    compare(c, old, 0.75, a, b, "from the left, scaled, " + what);
  }
  const int64_t stride = whole_depths(columns);
  Matrix a(rows, depth, padded(depth) + kPadding), b(depth, columns, stride, deep - depth);
  Matrix old(rows, columns, wide, 15);
  fill(a);
  fill(b);
  fill(old);
  for (int64_t i = 0; i < rows; ++i) a.at(i, depth) = 1e30f;  // behind the last term
  Matrix kept = b, c = old;
  split_right(kept.data(), deep, stride);
  multiply_tiles_from_right(rows, wide, depth, a.data(), a.stride,
                            right_planes(kept.data(), stride), c.data(), wide, kOverwrite<float>);
  compare(c, old, 0, a, b, "from the right " + what);
  c = old;
  multiply_tiles_from_right(rows, wide, depth, a.data(), a.stride,
                            right_planes(kept.data(), stride), c.data(), wide,
                            {true, scale.data()});
  compare(c, old, 0.75, a, b, "from the right, scaled, " + what);
}

// Sums of a statistic of `rows` rows of bfloat16 numbers, and a column of ones, against float64.
void statistics(const GramKernels<float>& kernels, const std::string& spec, int64_t dim,
                int64_t rows) {
  const bool on_tiles = &kernels == &amx::gram_kernels;
  GramRows& gram_rows = on_tiles ? amx::rows : avx512_bfloat16::rows;
  const std::string what = (on_tiles ? "on tiles " : "on vectors ") + spec + " of " +
                           std::to_string(rows) + " rows, d = " + std::to_string(dim);
  const Layout layout = make_layout(spec, dim);
  const int64_t features = dim - 1, b = layout.head + layout.tail, k = layout.block;
  std::vector<uint16_t> stored(static_cast<size_t>(rows * features));
  for (uint16_t& x : stored) x = Narrow<BFloat16>::of(random_number()).bits;
  const auto x = [&](int64_t r, int64_t j) {
    return j == features ? 1.0 : double(widen(BFloat16{stored[size_t(r * features + j)]}));
  };
  RowsView view{};
  view.array = {stored.data(), Scalar::kBFloat16};
  view.shared_stride = features;
  view.feature_stride = 1;
  view.count = view.shared = rows;
  view.features = features;
  view.scale = view.one = 1;
  std::vector<float> sums(static_cast<size_t>((dim + b + k + 1) * padded(std::max(dim, k))));
  std::vector<float> scratch(
      static_cast<size_t>(kChunkDepth * (kChunkColumns + k + padded(b) + 64)));
  const Panel all{0, rows, 0, dim};
  const auto compare_sum = [&](double got, int64_t i, int64_t j) {
    double sum = 0, size = 0;
    for (int64_t r = 0; r < rows; ++r) {
      sum += x(r, i) * x(r, j);
      size += std::abs(x(r, i) * x(r, j));
    }
    check_close(got, sum, kRounding * size,
                what + " at " + std::to_string(i) + ", " + std::to_string(j));
  };
  if (layout.family == Family::kDense) {
    constexpr int64_t kStrip = 40;  // no whole number of tiles
    scratch.resize(static_cast<size_t>(kChunkDepth * (padded(dim) + kPadding)));
    sums.resize(static_cast<size_t>(kStrip * padded(dim)));
    for (int64_t begin = 0; begin < dim; begin += kStrip) {
      const int64_t end = std::min(dim, begin + kStrip), width = padded(dim - begin);
      std::fill(sums.begin(), sums.end(), 0.0f);
      gram_rows(view, dim, begin, end, sums.data(), scratch.data());
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = i; j < dim; ++j) {
          compare_sum(sums[size_t((i - begin) * width + j - begin)], i, j);
        }
      }
    }
    return;
  }
  if (k > 0) {
    kernels.blocks(view, layout, all, sums.data(), scratch.data());
    for (int64_t begin = 0; begin < dim; begin += k) {
      const int64_t size = std::min(k, dim - begin);
      const float* block = sums.data() + begin / k * k * padded(k);
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t j = i; j < size; ++j) {
          compare_sum(block[i * padded(size) + j], begin + i, begin + j);
        }
      }
    }
    return;
  }
  kernels.border(view, layout, nullptr, all, sums.data(), scratch.data());
  for (int64_t r = 0; r <= b; ++r) {
    const int64_t i = r < layout.head ? r : dim - b + r;
    for (int64_t j = 0; j < dim; ++j) {
      compare_sum(sums[static_cast<size_t>(r * padded(dim) + j)], r < b ? i : j, j);
    }
  }
}

// NaN where functions called next have their arrays.
__attribute__((noinline)) void poison_stack() {
  volatile float numbers[1 << 14];
  for (volatile float& x : numbers) x = NAN;
}

// C C^T G K K^T of blocks on both sides, with a bias behind the weight, against float64.
void squares(int64_t rows, int64_t columns, int64_t left_block, int64_t right_block) {
  const std::string what = "blocks of " + std::to_string(left_block) + " and " +
                           std::to_string(right_block) + ", " + std::to_string(rows) + " x " +
                           std::to_string(columns);
  const int64_t gap = 5, stride = columns - 1 + gap;
  std::vector<uint16_t> weight(static_cast<size_t>(rows * stride)), bias(static_cast<size_t>(rows));
  for (auto* numbers : {&weight, &bias}) {
    for (uint16_t& x : *numbers) x = Narrow<BFloat16>::of(random_number()).bits;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < gap; ++j) weight[size_t(i * stride + columns - 1 + j)] = 0x7fc0;
  }
  StepLayer<float> layer;
  layer.parts[0].gradient = {weight.data(), Scalar::kBFloat16};
  layer.parts[0].height = layer.parts[1].height = rows;
  layer.parts[0].width = columns - 1;
  layer.parts[0].gradient_stride = stride;
  layer.parts[1].gradient = {bias.data(), Scalar::kBFloat16};
  layer.parts[1].begin = columns - 1;
  layer.parts[1].width = layer.parts[1].gradient_stride = 1;
  layer.num_parts = 2;
  layer.rows = rows;
  layer.columns = columns;
  layer.options = {0, 0, 0, 1};
  std::vector<float> memory[2], factors[2], scratch(4096);
  const auto prepare = [&](int side, LocalProduct<float>& product, int64_t dim, int64_t block,
                           Form form) {
    product.kind = LocalKind::kBlocks;
    product.form = form;
    product.layout = make_layout("block_diagonal:" + std::to_string(block), dim);
    const int64_t area = whole_depths(block) * whole_depths(block);
    memory[side].assign(static_cast<size_t>((dim / block + 1) * area), NAN);
    product.blocks = memory[side].data();
    factors[side].resize(static_cast<size_t>(dim * block));
    for (float& x : factors[side]) x = random_number();
    prepare_blocks(product, factors[side].data(), scratch.data());
  };
  prepare(0, layer.left, rows, left_block, Form::kLeftPlanes);
  prepare(1, layer.right, columns, right_block, Form::kRightPlanes);
  // P[i, j] of a side.
  const auto product = [&](int side, int64_t dim, int64_t k, int64_t i, int64_t j) {
    const int64_t begin = i / k * k, size = std::min(k, dim - begin);
    const float* f = factors[side].data() + begin * k;
    double sum = 0;
    for (int64_t p = 0; i / k == j / k && p < size; ++p) {
      sum += double(f[(i - begin) * size + p]) * f[(j - begin) * size + p];
    }
    return sum;
  };
  const Panel panel{0, rows, 0, columns};
  std::vector<float> x(static_cast<size_t>((rows + 15) * panel.stride()));
  poison_stack();
  check(precondition_squares(layer, panel, x.data()), what + " are no squares");
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0, size = 0;
      for (int64_t a = i / left_block * left_block; a < rows && a / left_block == i / left_block;
           ++a) {
        const double left = product(0, rows, left_block, i, a);
        for (int64_t b = j / right_block * right_block;
             b < columns && b / right_block == j / right_block; ++b) {
          const BFloat16 g{b + 1 < columns ? weight[size_t(a * stride + b)] : bias[size_t(a)]};
          const double term = left * double(widen(g)) * product(1, columns, right_block, b, j);
          sum += term;
          size += std::abs(term);
        }
      }
      // P is rounded to float32 sums and to planes; its terms may cancel within it.
      check_close(x[size_t(i * panel.stride() + j)], sum, 4 * kPlanes * size + 1e-4,
                  what + " at " + std::to_string(i) + ", " + std::to_string(j));
    }
  }
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512bf16")) {
    std::printf("skipped: this processor has no AVX-512 with bfloat16 products\n");
    return 0;
  }
  for (const int64_t rows : {1, 15, 16, 17, 30, 33}) {
    for (const int64_t columns : {1, 16, 30, 33, 100}) {
      for (const int64_t depth : {1, 2, 30, 31, 32, 33, 129, 160}) products(rows, columns, depth);
    }
  }
  for (const int64_t rows : {1, 2, 31, 127, 128, 129, 300}) {
    for (const auto* kernels : {&amx::gram_kernels, &avx512_bfloat16::gram_kernels}) {
      statistics(*kernels, "block_diagonal:30", 100, rows);
      statistics(*kernels, "block_diagonal:30", 31, rows);
      statistics(*kernels, "block_diagonal:21", 60, rows);
      statistics(*kernels, "block_diagonal:64", 130, rows);
      statistics(*kernels, "block_diagonal:100", 120, rows);
      statistics(*kernels, "hierarchical:15,15", 100, rows);
      statistics(*kernels, "rank_triu:24", 97, rows);
      statistics(*kernels, "rank_triu:1", 97, rows);
      statistics(*kernels, "dense", 33, rows);
      statistics(*kernels, "dense", 97, rows);
    }
  }
  squares(70, 100, 30, 32);
  squares(33, 31, 32, 30);
  squares(61, 65, 30, 24);
  return failures;
}
#else
int main() { return 0; }
#endif
