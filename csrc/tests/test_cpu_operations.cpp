// How the work of the CPU's kernels grows, in counted operations instead of time: the code of
// csrc/cpu is compiled here for plain instructions with a counter in its products and its passes
// over elements (SINGD_COUNT), and with stand-ins for the little that it takes from torch.
//
// Table 2 of the paper: a step is O(k d_i d_o), a statistic O(k m d), and nothing of a sparse
// structure is O(d^2).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

namespace {
struct Counts {
  int64_t multiply_adds = 0, elements = 0;
};
Counts counts;
}  // namespace

#define SINGD_COUNT(what, n) counts.what += (n)
#define SINGD_INSTRUCTIONS counted
#define SINGD_VECTOR_BYTES 16
#define SINGD_TILE_ROWS 4
#define SINGD_TILE_VECTORS 2
#define SINGD_MOST_TILE_ROWS 4
#include "../cpu/kernels.h"
#include "../cpu/local_factors.h"
#include "../cpu/local_step.h"
#include "../cpu/simd/kernels.h"
#include "../cpu/statistics.h"
#include "../structures/registry.h"
#include "../structures/spec.h"
#include "check.h"

namespace singd::cpu {
const Kernels& kernels() { return counted::kernels; }
const GramKernels<float>* bfloat16_gram(int64_t) { return nullptr; }
const StepKernels<float>* tile_step() { return nullptr; }
const StepKernels<float>* bfloat16_step() { return nullptr; }
bool pairs_are_faster() { return false; }
bool asking_pays() { return true; }
bool onednn_is_faster() { return false; }
}  // namespace singd::cpu

using namespace singd;
using namespace singd::cpu;
using namespace singd::tests;

namespace {

using Numbers = std::vector<float>;

ConstArray array_of(const Numbers& numbers) { return {numbers.data(), Scalar::kFloat32}; }

Numbers random_numbers(int64_t count) {
  Numbers numbers(static_cast<std::size_t>(count));
  uint32_t state = 1;
  for (float& number : numbers) {
    state = state * 1664525 + 1013904223;
    number = static_cast<float>(state >> 8) / (1 << 24) - 0.5f;
  }
  return numbers;
}

struct Shape {
  int64_t d_o, d_i, layers = 1;

  int64_t elements() const { return layers * d_o * d_i; }
};

// A step of layers with C and K of one structure, and with products that are kept where given.
Counts step(const std::string& spec, Shape shape, at::Tensor* products = nullptr) {
  const Layout left = make_layout(spec, shape.d_o), right = make_layout(spec, shape.d_i);
  const Numbers gradient = random_numbers(shape.d_o * shape.d_i);
  const Numbers c = random_numbers(storage_size(left)), k = random_numbers(storage_size(right));
  Numbers weight = gradient, momentum = gradient;
  at::Tensor workspace;
  LocalStep<float> local(workspace, products);
  for (int64_t i = 0; i < shape.layers; ++i) {
    StepLayer<float> layer;
    layer.rows = shape.d_o;
    layer.columns = shape.d_i;
    layer.options = {0.1, 0.9, 0.01, 1};
    layer.num_parts = 1;
    StepPart& part = layer.parts[0];
    part.weight = {weight.data(), Scalar::kFloat32};
    part.momentum = {momentum.data(), Scalar::kFloat32};
    part.gradient = array_of(gradient);
    part.height = shape.d_o;
    part.width = part.gradient_stride = shape.d_i;
    local.add(layer, {left, array_of(c), storage_size(left)},
              {right, array_of(k), storage_size(right)});
  }
  counts = {};
  local.run([&](size_t, bool updated) { check(updated, spec + ": the step was refused"); });
  check(weight != gradient && momentum != gradient, spec + ": nothing was written");
  return counts;
}

// The statistic of m rows.
Counts statistic(const std::string& spec, int64_t m, int64_t d) {
  const Layout layout = make_layout(spec, d);
  const Numbers x = random_numbers(m * d), factor = random_numbers(storage_size(layout));
  Numbers sums(static_cast<std::size_t>(storage_size(layout)), 0.0f);
  const RowsView rows{array_of(x), d, 0, 1, m, 1, d, false, 1.0, 1.0};
  counts = {};
  LocalStatistic<float>(rows, layout, factor.data(), sums.data()).add();
  check(sums != Numbers(sums.size(), 0.0f), spec + ": the statistic is empty");
  return counts;
}

// An update of the factors of layers with two d x d factors.
Counts update(const std::string& spec, int64_t d, int64_t layers = 1) {
  const Layout layout = make_layout(spec, d);
  const int64_t size = storage_size(layout);
  const Numbers statistic(static_cast<std::size_t>(size), 1e-3f);
  std::vector<Numbers> state(static_cast<std::size_t>(4 * layers), statistic);
  std::vector<FactorTask> tasks(static_cast<std::size_t>(2 * layers));
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    tasks[i].layout = layout;
    tasks[i].size = size;
    tasks[i].statistic = array_of(statistic);
    tasks[i].factor = {state[2 * i].data(), Scalar::kFloat32};
    tasks[i].momentum = {state[2 * i + 1].data(), Scalar::kFloat32};
  }
  at::Tensor workspace;
  counts = {};
  std::vector<std::size_t> all(static_cast<std::size_t>(layers));
  std::iota(all.begin(), all.end(), std::size_t{0});
  LocalFactors(workspace, {1e-3, 0.1, 0.5, 1e9, false, false, 1}).run(tasks, all);
  for (const Numbers& numbers : state) check(numbers != statistic, spec + ": was not updated");
  return counts;
}

void check_at_most(int64_t got, int64_t bound, const std::string& what) {
  check(got <= bound, what + ": " + std::to_string(got) + ", more than " + std::to_string(bound));
}

void check_same(int64_t got, int64_t expected, const std::string& what) {
  check(got == expected,
        what + ": " + std::to_string(got) + " instead of " + std::to_string(expected));
}

std::string sized(const std::string& family, int64_t k) { return family + ":" + std::to_string(k); }

const std::vector<std::string> kBorders{"rank_triu", "rank_tril", "rank_triu_topleft",
                                        "rank_tril_topleft"};

// Diagonal: one read for the check and one pass that writes; no product.
void test_diagonal_step() {
  for (const Shape shape : {Shape{64, 128}, Shape{256, 128}, Shape{64, 1024}, Shape{64, 128, 5}}) {
    const Counts got = step("diagonal", shape);
    check_same(got.multiply_adds, 0, "diagonal step: multiply-adds");
    check_same(got.elements, 2 * shape.elements(), "diagonal step: elements");
  }
}

// Blocks of width k on both sides: 2 k multiply-adds an element, and d k^2 for P = F F^T; a read
// for the check, one into scratch and the write.
void test_block_step() {
  for (const int64_t k : {16, 32, 64}) {
    for (const Shape shape : {Shape{128, 256}, Shape{512, 256}, Shape{128, 1024}}) {
      const int64_t sides = shape.d_o + shape.d_i;
      const Counts got = step(sized("block_diagonal", k), shape);
      const std::string what = "step with blocks of " + std::to_string(k);
      check_same(got.multiply_adds, 2 * k * shape.elements() + k * k * sides, what);
      check_same(got.elements, 3 * shape.elements() + k * sides, what + ": elements");
    }
  }
  // Widths that are no whole vectors are padded to the next one.
  const Shape shape{390, 600};
  check_at_most(step("block_diagonal:30", shape).multiply_adds,
                2 * 32 * padded(shape.d_o) * padded(shape.d_i), "step with blocks of 30");
}

// A border of width b on both sides: its thin products and their return on each side, 4 b
// multiply-adds an element. What an arrowhead returns to its own border is left out: rows, and as
// many columns as fill vectors.
int64_t border_products(const std::string& spec, Shape shape) {
  const Layout left = make_layout(spec, shape.d_o), right = make_layout(spec, shape.d_i);
  const int64_t b = left.head + left.tail;
  const int64_t rows = left.transposed ? shape.d_o : shape.d_o - b;
  const int64_t columns = right.transposed ? shape.d_i : padded(shape.d_i - right.tail);
  return b * (2 * shape.elements() + shape.layers * (rows * shape.d_i + shape.d_o * columns));
}

// A step with the products of an earlier one: P is not made again.
void test_kept_products() {
  for (const std::string spec : {"block_diagonal:32", "hierarchical:16,16", "rank_tril:16"}) {
    const Shape shape{128, 256, 3};
    at::Tensor products;
    const Counts first = step(spec, shape, &products), alone = step(spec, shape);
    check_same(first.multiply_adds, alone.multiply_adds, "step that keeps products: " + spec);
    const bool is_block = spec == "block_diagonal:32";
    check_same(step(spec, shape, &products).multiply_adds,
               is_block ? 2 * 32 * shape.elements() : border_products(spec, shape),
               "step with kept products: " + spec);
  }
}

// A read for the left side's thin products, one into scratch, the write.
void test_border_step() {
  for (const int64_t b : {16, 32, 64}) {
    std::vector<std::string> specs;
    for (const std::string& family : kBorders) specs.push_back(sized(family, b));
    const std::string half = std::to_string(b / 2);
    specs.push_back("hierarchical:" + half + "," + half);
    for (const Shape shape : {Shape{128, 256}, Shape{512, 256}, Shape{128, 1024}}) {
      const int64_t sides = shape.d_o + shape.d_i;
      for (const std::string& spec : specs) {
        const Counts got = step(spec, shape);
        const int64_t products = got.multiply_adds - border_products(spec, shape);
        check(products >= 0, "step with " + spec + " multiplies less than thin products take");
        check_at_most(products, b * b * sides, "step with " + spec + ": preparation");
        check_at_most(got.elements, 3 * shape.elements() + 2 * b * sides,
                      "step with " + spec + ": elements");
      }
    }
  }
}

// A border of width 1, which has kernels of its own that pad nothing.
void test_thin_border_step() {
  for (const std::string& family : kBorders) {
    for (const Shape shape : {Shape{128, 256}, Shape{512, 1024}}) {
      const Counts got = step(sized(family, 1), shape);
      check(got.multiply_adds >= 4 * shape.elements(),
            "step with " + family + ":1 multiplies less than thin products take");
      check_at_most(got.multiply_adds, 4 * shape.elements() + 16 * (shape.d_o + shape.d_i),
                    "step with " + family + ":1");
    }
  }
}

void test_layers() {
  for (const char* spec :
       {"diagonal", "block_diagonal:32", "rank_triu:1", "rank_tril:16", "hierarchical:16,16"}) {
    const Counts one = step(spec, {256, 128}), many = step(spec, {256, 128, 7});
    check_same(many.multiply_adds, 7 * one.multiply_adds, std::string(spec) + ": seven layers");
    check_same(many.elements, 7 * one.elements, std::string(spec) + ": seven layers' elements");
  }
}

// Exactly k multiply-adds an element of X for row borders, which keep entries of U, and little over
// half of that for blocks, whose triangles are alike. A column border takes S = X K[:, B] first.
// Elements: one visit, and squares where a diagonal is kept; rows are padded, and every panel of
// columns loads the border's once more.
void test_statistics() {
  for (const int64_t d : {192, 768}) {
    for (const int64_t m : {128, 512}) {
      const std::string of = " of " + std::to_string(m) + " x " + std::to_string(d);
      const Counts diagonal = statistic("diagonal", m, d);
      check_same(diagonal.multiply_adds, 0, "diagonal statistic: multiply-adds" + of);
      check_same(diagonal.elements, m * d, "diagonal statistic: elements" + of);
      for (const int64_t k : {16, 32, 64}) {
        const Counts blocks = statistic(sized("block_diagonal", k), m, d);
        constexpr int64_t kVector = 4;  // numbers, of whose rows the upper triangle is made
        check_same(blocks.multiply_adds, m * d * (k + kVector) / 2, "statistic of blocks" + of);
        check_at_most(blocks.elements, m * d + m * d / 4, "statistic of blocks: elements" + of);
        const std::string half = std::to_string(k / 2);
        for (const std::string& spec : {sized("rank_triu", k), sized("rank_tril_topleft", k),
                                        "hierarchical:" + half + "," + half}) {
          const Counts border = statistic(spec, m, d);
          check_same(border.multiply_adds, m * d * k, "statistic of " + spec + of);
          check_at_most(border.elements, 4 * m * d, "statistic of " + spec + ": elements" + of);
        }
        for (const std::string& spec : {sized("rank_tril", k), sized("rank_triu_topleft", k)}) {
          const Counts border = statistic(spec, m, d);
          check_same(border.multiply_adds, 2 * m * d * k + k * k * d, "statistic of " + spec + of);
          check_at_most(border.elements, 3 * m * d + k * d,
                        "statistic of " + spec + ": elements" + of);
        }
      }
    }
  }
}

// Rows beyond the chunks that they come in cost what all others cost.
void test_rows() {
  for (const char* spec : {"diagonal", "block_diagonal:30", "rank_triu:1", "hierarchical:15,15"}) {
    const Counts one = statistic(spec, 64, 390), many = statistic(spec, 10 * 64, 390);
    check_same(many.multiply_adds, 10 * one.multiply_adds, std::string(spec) + ": ten chunks");
    check_same(many.elements, 10 * one.elements, std::string(spec) + ": ten chunks' elements");
  }
}

// Products of blocks or of thin borders, each d k^2 multiply-adds, a few for each factor.
void test_factor_updates() {
  for (const int64_t k : {16, 32, 64}) {
    const std::string half = std::to_string(k / 2);
    const std::vector<std::pair<std::string, int64_t>> products{
        {sized("block_diagonal", k), 3},
        {sized("rank_triu", k), 3},
        {sized("rank_tril", k), 2},
        {"hierarchical:" + half + "," + half, 3}};
    for (const auto& [spec, number] : products) {
      for (const int64_t d : {256, 1024}) {
        check_same(update(spec, d).multiply_adds, 2 * number * d * k * k, "update of " + spec);
      }
      check_same(update(spec, 256, 5).multiply_adds, 5 * 2 * number * 256 * k * k,
                 "update of five layers of " + spec);
    }
  }
  check_same(update("diagonal", 1024).multiply_adds, 0, "update of diagonal factors");
}

// The bound of the spectral norm of a momentum, in one part and in three: alpha1 = 1 and a
// normalised lr_cov keep the old momentum as it is.
double momentum_norm(const Layout& layout, Numbers& numbers, int64_t parts) {
  const std::size_t n = static_cast<std::size_t>(layout.dim);
  Numbers zeros(numbers.size(), 0.0f), m = zeros;
  FactorTask task;
  task.layout = layout;
  task.size = static_cast<int64_t>(numbers.size());
  task.statistic = array_of(zeros);
  task.momentum = {numbers.data(), Scalar::kFloat32};
  task.h = m.data();
  task.gram = {zeros.data(), Scalar::kFloat32};
  const FactorOptions options{1e-3, 0.1, 1, 1e9, true, true, 1};
  const FactorKernels& factors = kernels().factors(Scalar::kFloat32);
  std::vector<double> columns(static_cast<std::size_t>(parts) * n);
  std::vector<MomentumSums> sums(static_cast<std::size_t>(parts));
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t rows = storage_rows(layout);
    MomentumSums& part = sums[static_cast<std::size_t>(i)];
    part.columns = columns.data() + i * layout.dim;
    factors.momentum(task, task, options, rows * i / parts, rows * (i + 1) / parts, part);
  }
  check(m == numbers, "the momentum is not the old one");
  factors.step_size(task, sums.data(), parts, options);
  return task.momentum_norm;
}

void test_norms() {
  for (const char* spec :
       {"dense", "tril", "triu", "diagonal", "block_diagonal:3", "rank_triu:2", "rank_tril:2",
        "rank_tril_topleft:2", "hierarchical:2,3", "triu_toeplitz", "tril_toeplitz"}) {
    for (const int64_t d : {1, 5, 7, 40}) {
      const Layout layout = make_layout(spec, d);
      const std::size_t n = static_cast<std::size_t>(d);
      const Numbers random = random_numbers(storage_size(layout));
      Numbers numbers(random.size(), 0.0f);  // zero outside the pattern, as factors are
      std::vector<double> row_sums(n, 0.0), column_sums(n, 0.0);
      double squares = 0;
      visit(layout, [&](const auto& family) {
        family.for_each_entry([&](int64_t slot, int64_t i, int64_t j, int) {
          const double value = numbers[slot] = random[slot];
          row_sums[i] += std::abs(value);
          column_sums[j] += std::abs(value);
          squares += value * value;
        });
      });
      const double rows = *std::max_element(row_sums.begin(), row_sums.end());
      const double columns = *std::max_element(column_sums.begin(), column_sums.end());
      const double expected = std::min(std::sqrt(squares), std::sqrt(rows * columns));
      for (const int64_t parts : {1, 3}) {
        const double got = momentum_norm(layout, numbers, parts);
        check(std::abs(got - expected) <= 1e-5 * expected,
              std::string(spec) + ": the norm of dimension " + std::to_string(d) + " is " +
                  std::to_string(got) + " instead of " + std::to_string(expected));
      }
    }
  }
}

// The lower triangle becomes the transpose of the upper one, for elements of every size.
template <class Element>
void test_mirror() {
  for (const int64_t d : {1, 7, 64, 65, 150}) {
    std::vector<Element> square(static_cast<std::size_t>(d * d));
    for (std::size_t i = 0; i < square.size(); ++i) square[i] = static_cast<Element>(i);
    std::vector<Element> mirrored = square;
    for (const int64_t half : {d / 3, d}) {
      const int64_t begin = half == d ? d / 3 : 0;
      kernels().mirror(mirrored.data(), sizeof(Element), d, begin, half);
    }
    bool same = true;
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) {
        const int64_t from = i < j ? i * d + j : j * d + i;
        same &= mirrored[static_cast<std::size_t>(i * d + j)] == static_cast<Element>(from);
      }
    }
    check(same, "mirror of dimension " + std::to_string(d) + ", elements of " +
                    std::to_string(sizeof(Element)) + " bytes");
  }
}

}  // namespace

int main() {
  test_norms();
  test_mirror<uint16_t>();
  test_mirror<float>();
  test_mirror<double>();
  test_factor_updates();
  test_diagonal_step();
  test_block_step();
  test_kept_products();
  test_border_step();
  test_thin_border_step();
  test_layers();
  test_statistics();
  test_rows();
  return failures;
}
