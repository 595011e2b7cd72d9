// Whole steps of layers in bfloat16, on emulated AMX tiles and with pairs of bfloat16 numbers:
// LocalStep's plan and all of its kernels, with blocks and borders on either side, against float64.
#define SINGD_EMULATED_TILES 1
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/simd_bfloat16.cpp"
// Behind the kernels for pairs.
#include "../cpu/local_step.h"
#include "../cpu/simd_amx.cpp"
#include "../structures/registry.h"
#include "../structures/spec.h"
#include "check.h"

#if defined(__x86_64__)
namespace singd::cpu {
const Kernels& kernels() { throw std::logic_error("a step in bfloat16 took other kernels"); }
bool on_tiles;
const StepKernels<float>* tile_step() { return on_tiles ? &amx::step_kernels : nullptr; }
const StepKernels<float>* bfloat16_step() { return &avx512_bfloat16::step_kernels; }
bool asking_pays() { return true; }
bool pairs_are_faster() { return true; }
}  // namespace singd::cpu

namespace {

using namespace singd;
using namespace singd::cpu;
using namespace singd::tests;

// Errors as parts of the sum of |terms|: of the planes of both products, and of the roundings
// of pairs to bfloat16.
constexpr double kPlanes = 1.0 / (1 << 13), kPairs = 1.0 / (1 << 9);
constexpr double kStored = 1.0 / (1 << 8);  // of a number in bfloat16

uint32_t state = 1;
float random_number() {
  state = state * 1664525 + 1013904223;
  return static_cast<float>(state >> 8) / (1 << 24) - 0.5f;
}

struct Matrix {
  int64_t rows, columns;
  std::vector<double> numbers;

  Matrix(int64_t r, int64_t c) : rows(r), columns(c), numbers(static_cast<size_t>(r * c)) {}
  double& at(int64_t i, int64_t j) { return numbers[static_cast<size_t>(i * columns + j)]; }
  double at(int64_t i, int64_t j) const { return numbers[static_cast<size_t>(i * columns + j)]; }
};

Matrix times(const Matrix& a, const Matrix& b) {
  Matrix c(a.rows, b.columns);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t p = 0; p < a.columns; ++p) {
      for (int64_t j = 0; j < b.columns; ++j) c.at(i, j) += a.at(i, p) * b.at(p, j);
    }
  }
  return c;
}

Matrix magnitudes(Matrix m) {
  for (double& x : m.numbers) x = std::abs(x);
  return m;
}

// Numbers as a step takes them, in bfloat16.
struct Stored {
  std::vector<uint16_t> bits;

  explicit Stored(int64_t count) : bits(static_cast<size_t>(count)) {
    for (uint16_t& x : bits) x = amx::Narrow<amx::BFloat16>::of(random_number()).bits;
  }
  double at(int64_t i) const { return amx::widen(amx::BFloat16{bits[static_cast<size_t>(i)]}); }
  Array array() { return {bits.data(), Scalar::kBFloat16}; }
};

// A factor: random numbers where it is not zero, P = F F^T, and |F| |F|^T.
struct Factor {
  Layout layout;
  std::vector<float> storage;
  Stored bits;  // the same numbers, in bfloat16
  Matrix P, size;

  Factor(const std::string& spec, int64_t dim)
      : layout(make_layout(spec, dim)),
        storage(static_cast<size_t>(storage_size(layout))),
        bits(0),
        P(dim, dim),
        size(dim, dim) {
    const Stored random(storage_size(layout));
    Matrix f(dim, dim), transposed(dim, dim);
    visit(layout, [&](const auto& family) {
      family.for_each_entry([&](int64_t slot, int64_t i, int64_t j, int) {
        f.at(i, j) = transposed.at(j, i) = random.at(slot);
        storage[static_cast<size_t>(slot)] = static_cast<float>(random.at(slot));
      });
    });
    for (const float x : storage) bits.bits.push_back(amx::Narrow<amx::BFloat16>::of(x).bits);
    P = times(f, transposed);
    size = times(magnitudes(f), magnitudes(transposed));
  }
  // Planes are made of any numbers, pairs of bfloat16 numbers alone.
  LocalFactor local() const {
    const ConstArray numbers = on_tiles ? ConstArray{storage.data(), Scalar::kFloat32}
                                        : ConstArray{bits.bits.data(), Scalar::kBFloat16};
    return {layout, numbers, static_cast<int64_t>(storage.size())};
  }
};

enum class Order { kRows, kTurned, kChannelsLast, kChannelsApart };

// The smallest kernel of which a row of so many numbers has whole channels.
int64_t least_taps(int64_t numbers) {
  int64_t taps = 2;
  while (numbers % taps != 0) ++taps;
  return taps;
}

// A layer with a bias behind the weight, or below it: its parts of weight, momentum and gradient.
struct Layer {
  int64_t rows, columns;
  bool turned, apart;
  int64_t taps;
  Factor left, right;
  std::vector<Stored> weights, momenta, gradients;

  Layer(int64_t r, int64_t c, Order order, const std::string& left_spec,
        const std::string& right_spec)
      : rows(r),
        columns(c),
        turned(order == Order::kTurned),
        apart(order == Order::kChannelsApart),
        taps(apart || order == Order::kChannelsLast ? least_taps(c - 1) : 1),
        left(left_spec, r),
        right(right_spec, c) {
    const int64_t bias = turned ? columns : rows;
    for (auto* list : {&weights, &momenta, &gradients}) {
      list->emplace_back(rows * columns - bias);
      list->emplace_back(bias);
    }
  }

  StepLayer<float> step(const StepOptions& options) {
    StepLayer<float> layer;
    layer.rows = rows;
    layer.columns = columns;
    layer.options = options;
    layer.num_parts = 2;
    layer.parts[0].taps = taps;
    layer.parts[0].apart = apart ? rows * taps : 0;
    for (size_t i = 0; i < 2; ++i) {
      StepPart& part = layer.parts[i];
      part.weight = weights[i].array();
      part.momentum = momenta[i].array();
      part.gradient = {gradients[i].bits.data(), Scalar::kBFloat16};
      int64_t& begin = turned ? part.row_begin : part.begin;
      begin = i == 0 ? 0 : (turned ? rows : columns) - 1;
      const int64_t lines = i == 0 ? (turned ? rows : columns) - 1 : 1;
      part.height = turned ? lines : rows;
      part.width = part.gradient_stride = turned ? columns : lines;
      if (part.apart > 0) part.gradient_stride = taps;
    }
    return layer;
  }

  double of(const std::vector<Stored>& parts, int64_t i, int64_t j) const {
    if (turned) return i + 1 < rows ? parts[0].at(i * columns + j) : parts[1].at(j);
    if (j + 1 == columns) return parts[1].at(i);
    if (apart) return parts[0].at((j / taps * rows + i) * taps + j % taps);
    const int64_t channels = (columns - 1) / taps;
    return parts[0].at(i * (columns - 1) + j % taps * channels + j / taps);
  }
  Matrix gradient() const {
    Matrix g(rows, columns);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) g.at(i, j) = of(gradients, i, j);
    }
    return g;
  }
};

// M <- alpha M + P_C G P_K + gamma W and W <- W - lr M of `after` against what it was.
void compare(const Layer& before, const Layer& after, const StepOptions& o,
             const std::string& what) {
  const Matrix G = before.gradient();
  const Matrix update = times(times(before.left.P, G), before.right.P);
  const Matrix size = times(times(before.left.size, magnitudes(G)), before.right.size);
  for (int64_t i = 0; i < before.rows; ++i) {
    for (int64_t j = 0; j < before.columns; ++j) {
      const std::string where = what + " at " + std::to_string(i) + ", " + std::to_string(j);
      const double w = before.of(before.weights, i, j);
      const double m = o.momentum * before.of(before.momenta, i, j) + o.unscale * update.at(i, j) +
                       o.weight_decay * w;
      const double error = (on_tiles ? kPlanes : kPairs) * o.unscale * size.at(i, j);
      check_close(after.of(after.momenta, i, j), m, error + kStored * std::abs(m), where);
      const double next = w - o.lr * m;
      check_close(after.of(after.weights, i, j), next, o.lr * error + kStored * std::abs(next),
                  where + ", weight");
    }
  }
}

struct Shape {
  int64_t rows, columns;
};

// Layers of all these shapes in one step. Gradients that are not unscaled fill a single plane.
void step(const std::string& left, const std::string& right, const std::vector<Shape>& shapes,
          double unscale) {
  const StepOptions options{0.1, 0.9, 0.01, unscale};
  std::vector<Layer> layers;
  for (const Shape& shape : shapes) {
    for (const Order order :
         {Order::kRows, Order::kTurned, Order::kChannelsLast, Order::kChannelsApart}) {
      layers.emplace_back(shape.rows, shape.columns, order, left, right);
    }
  }
  const std::vector<Layer> before = layers;
  at::Tensor workspace;
  LocalStep<float> local(workspace, nullptr);
  for (Layer& layer : layers)
    local.add(layer.step(options), layer.left.local(), layer.right.local());
  local.run([&](size_t, bool updated) { check(updated, "the step was refused"); });
  for (size_t i = 0; i < layers.size(); ++i) {
    compare(before[i], layers[i], options,
            std::string(on_tiles ? "tiles, " : "pairs, ") + left + " and " + right + ", " +
                std::to_string(layers[i].rows) + " x " + std::to_string(layers[i].columns) +
                (layers[i].turned ? ", turned" : "") +
                (layers[i].apart      ? ", channels apart"
                 : layers[i].taps > 1 ? ", channels-last"
                                      : ""));
  }
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512bf16")) {
    std::printf("skipped: this processor has no AVX-512 with bfloat16 products\n");
    return 0;
  }
  // Sides that fill tiles, or are diagonal; pairs also have borders of an odd width.
  std::vector<std::string> specs{
      "diagonal",     "block_diagonal:30", "hierarchical:15,15",  "hierarchical:3,27",
      "rank_triu:30", "rank_tril:30",      "rank_triu_topleft:24"};
  for (const bool tiles : {true, false}) {
    on_tiles = tiles;
    if (!tiles) specs.insert(specs.end(), {"hierarchical:5,4", "rank_tril:7"});
    for (const double unscale : {1.0, 0.5}) {
      for (const std::string& left : specs) {
        for (const std::string& right : specs) {
          step(left, right, {{35, 33}, {47, 40}, {64, 97}, {100, 47}}, unscale);
        }
      }
      step("hierarchical:15,15", "hierarchical:15,15", {{257, 300}}, unscale);
      step("rank_triu:64", "rank_tril:64", {{70, 131}}, unscale);
    }
  }
  return failures;
}
#else
int main() { return 0; }
#endif
