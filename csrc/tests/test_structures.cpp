// Every family against dense loops in float64, with plain loops in place of a BLAS.
#include <random>

#include "../structures/registry.h"
#include "check.h"

using namespace singd;
using namespace singd::tests;

namespace {

using Matrix = std::vector<double>;  // row-major d x d, or rows x d

struct PlainMath {
  static constexpr int64_t kDirectToeplitz = INT64_MAX;  // there is no FFT here

  template <class A, class B, class T>
  static void multiply_add(int64_t m, int64_t n, int64_t k, MatrixView<A> a, MatrixView<B> b,
                           MatrixView<T> c, int64_t batch = 1) {
    for (int64_t t = 0; t < batch; ++t) {
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          T& out = c.data[t * c.batch_stride + i * c.row_stride + j * c.column_stride];
          for (int64_t l = 0; l < k; ++l) {
            out += a.data[t * a.batch_stride + i * a.row_stride + l * a.column_stride] *
                   b.data[t * b.batch_stride + l * b.row_stride + j * b.column_stride];
          }
        }
      }
    }
  }

  template <class A, class B, class T>
  static void multiply(int64_t m, int64_t n, int64_t k, MatrixView<A> a, MatrixView<B> b,
                       MatrixView<T> c, int64_t batch = 1) {
    for (int64_t t = 0; t < batch; ++t) {
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          c.data[t * c.batch_stride + i * c.row_stride + j * c.column_stride] = 0;
        }
      }
    }
    multiply_add(m, n, k, a, b, c, batch);
  }

  template <class A, class B, class T>
  static void multiply_symmetric(int64_t d, int64_t k, MatrixView<A> a, MatrixView<B> b,
                                 MatrixView<T> c, bool add) {
    add ? multiply_add(d, d, k, a.transpose(), b, c) : multiply(d, d, k, a.transpose(), b, c);
  }

  template <class Function>
  static void parallel_for(int64_t count, int64_t, Function f) {
    f(int64_t{0}, count);
  }

  template <class T>
  static void convolve(const T*, int64_t, Side, bool, const T*, T*, int64_t) {}
  template <class T>
  static void add_autocorrelation(const T*, int64_t, int64_t, T*) {}
  static void correlate(const double*, const double*, int64_t, double*) {}
};

Matrix random_matrix(int64_t rows, int64_t columns, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  Matrix m(rows * columns);
  for (double& value : m) value = normal(generator);
  return m;
}

Matrix product(const Matrix& a, const Matrix& b, int64_t m, int64_t k, int64_t n) {
  Matrix c(m * n, 0.0);
  PlainMath::multiply_add(m, n, k, MatrixView<const double>{a.data(), k},
                          MatrixView<const double>{b.data(), n}, MatrixView<double>{c.data(), n});
  return c;
}

Matrix transpose(const Matrix& a, int64_t rows, int64_t columns) {
  Matrix t(a.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) t[j * rows + i] = a[i * columns + j];
  }
  return t;
}

template <class FamilyT>
Matrix to_dense(const FamilyT& family, const Matrix& k) {
  const int64_t d = family.layout.dim;
  Matrix dense(d * d, 0.0);
  family.for_each_entry(
      [&](int64_t slot, int64_t i, int64_t j, int) { dense[i * d + j] = k[slot]; });
  return dense;
}

void check_matrices(const Matrix& got, const Matrix& expected, const std::string& what) {
  check_equal(got.size(), expected.size(), what + ": size");
  double worst = 0;
  for (size_t i = 0; i < std::min(got.size(), expected.size()); ++i) {
    worst = std::max(worst, std::abs(got[i] - expected[i]));
  }
  check(worst <= 1e-10, what + " is off by " + std::to_string(worst));
}

// What accumulate_statistic_ gathers of rows with X^T X = u and K^T u K = h: of families with local
// products by definition, of the others by their own code.
template <class FamilyT>
Matrix statistic_of(const FamilyT& family, const Matrix& k, const Matrix& rows, int64_t m,
                    const Matrix& u, const Matrix& h) {
  const Layout& layout = family.layout;
  const int64_t d = layout.dim;
  Matrix statistic(family.size(), 0.0);
  if constexpr (std::is_same_v<FamilyT, Dense> || std::is_same_v<FamilyT, Toeplitz>) {
    family.template accumulate<PlainMath, double>(k.data(), rows.data(), m, statistic.data());
    return statistic;
  }
  const Matrix& source = layout.transposed ? h : u;
  family.for_each_entry(
      [&](int64_t slot, int64_t i, int64_t j, int) { statistic[slot] = source[i * d + j]; });
  for (int64_t r = 0; r < layout.head + layout.tail; ++r) {  // whole rows of the border
    const int64_t i = r < layout.head ? r : d - layout.tail + r - layout.head;
    std::copy_n(source.begin() + i * d, d, statistic.begin() + r * d);
  }
  return statistic;
}

template <class FamilyT>
void test_family(const FamilyT& family, const std::string& what) {
  const int64_t d = family.layout.dim, n = 3;
  const auto random_factor = [&](uint32_t seed) {
    const Matrix a = random_matrix(d, d, seed);
    Matrix k(family.size(), 0.0);
    family.for_each_entry([&](int64_t slot, int64_t i, int64_t j, int) { k[slot] = a[i * d + j]; });
    return k;
  };
  const Matrix k = random_factor(1), other = random_factor(2);
  const Matrix dense = to_dense(family, k), x = random_matrix(d, n, 3), y = random_matrix(n, d, 4);

  for (const bool transposed : {false, true}) {
    const Matrix op = transposed ? transpose(dense, d, d) : dense;
    Matrix out(d * n);
    family.template multiply<PlainMath, double>(k.data(), Side::kLeft, transposed, x.data(),
                                                out.data(), n);
    check_matrices(out, product(op, x, d, d, n), what + ": op(K) X");
    family.template multiply<PlainMath, double>(k.data(), Side::kRight, transposed, y.data(),
                                                out.data(), n);
    check_matrices(out, product(y, op, n, d, d), what + ": X op(K)");
  }

  Matrix c(family.size(), 0.0);
  family.template product<PlainMath, double>(k.data(), other.data(), c.data());
  check_matrices(to_dense(family, c), product(dense, to_dense(family, other), d, d, d),
                 what + ": the product stays in the structure");

  const auto projected = [&](const Matrix& symmetric) {
    Matrix h(family.size(), 0.0);
    family.project(symmetric.data(), h.data());
    return to_dense(family, h);
  };
  const Matrix kt = transpose(dense, d, d);
  Matrix gram(family.size(), 0.0);
  family.template gram<PlainMath, double>(k.data(), gram.data());
  check_matrices(to_dense(family, gram), projected(product(kt, dense, d, d, d)), what + ": gram");

  for (const int64_t m : {int64_t{2}, 2 * d + 3}) {  // few rows and many
    const Matrix rows = random_matrix(m, d, 5);
    const Matrix u = product(transpose(rows, m, d), rows, d, m, d);
    const Matrix conjugated = product(product(kt, u, d, d, d), dense, d, d, d);
    const Matrix statistic = statistic_of(family, k, rows, m, u, conjugated);
    Matrix h(family.size(), 0.0);
    family.template conjugate<PlainMath, double>(k.data(), statistic.data(), h.data());
    check_matrices(to_dense(family, h), projected(conjugated),
                   what + ": Pi(K^T U K) of " + std::to_string(m) + " rows");
  }

  double trace = 0;
  for (int64_t i = 0; i < d; ++i) trace += dense[i * d + i];
  check_close(family.trace(k.data()), trace, 1e-10, what + ": trace");
  Matrix shifted = k;
  family.add_to_diagonal(shifted.data(), 2.0);
  check_close(family.trace(shifted.data()), trace + 2.0 * static_cast<double>(d), 1e-10,
              what + ": diagonal");
}

}  // namespace

int main() {
  for (const char* spec :
       {"dense", "tril", "triu", "diagonal", "block_diagonal:3", "rank_triu:2", "rank_tril:2",
        "rank_triu_topleft:2", "rank_tril_topleft:2", "hierarchical:2,3", "hierarchical:1,1",
        "triu_toeplitz", "tril_toeplitz"}) {
    for (const int64_t dim : {1, 2, 3, 4, 5, 6, 7, 11}) {
      const std::string what = std::string(spec) + " of dimension " + std::to_string(dim);
      visit(make_layout(spec, dim), [&](const auto& family) { test_family(family, what); });
    }
  }
  return failures;
}
