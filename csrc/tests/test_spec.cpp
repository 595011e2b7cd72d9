// Specs: aliases, defaults, errors, and the layouts and sizes they mean.
#include <stdexcept>

#include "../structures/spec.h"
#include "check.h"

using namespace singd;
using namespace singd::tests;

namespace {

void test_canonical_specs() {
  const std::pair<const char*, const char*> cases[] = {
      {"dense", "dense"},
      {"block_diagonal", "block_diagonal:32"},
      {"block_diagonal:7", "block_diagonal:7"},
      {"block30diagonal", "block_diagonal:30"},
      {"hierarchical", "hierarchical:16,16"},
      {"hierarchical15_15", "hierarchical:15,15"},
      {"rank_triu", "rank_triu:1"},
      {"rank_tril_topleft:3", "rank_tril_topleft:3"},
      {"triltoeplitz", "tril_toeplitz"},
      {"triutoeplitz", "triu_toeplitz"},
  };
  for (const auto& [spec, expected] : cases) check_equal(canonical_spec(spec), expected, spec);
}

void test_bad_specs() {
  for (const char* spec :
       {"", "Dense", "diag", "dense:1", "block_diagonal:", "block_diagonal:0", "block_diagonal:-3",
        "block_diagonal:1.5", "block_diagonal:1,2", "hierarchical:3", "hierarchical:1,2,3",
        "rank_triu:99999999999999999999", "block_diagonal: 3", "toeplitz"}) {
    check_throws<std::invalid_argument>([&] { canonical_spec(spec); }, std::string(spec),
                                        "bad spec '" + std::string(spec) + "'");
  }
  check_throws<std::invalid_argument>([] { make_layout("diagonal", 0); }, "at least 1", "dim 0");
  check_throws<std::invalid_argument>([] { make_layout("dense", int64_t{1} << 32); }, "2**31",
                                      "dim 2**32");
}

void test_sizes() {
  struct Case {
    const char* spec;
    int64_t dim, size;
  };
  const Case cases[] = {
      {"dense", 5, 25},
      {"tril", 5, 25},
      {"diagonal", 5, 5},
      {"block_diagonal:2", 5, 4 + 4 + 1},
      {"block_diagonal:5", 5, 25},
      {"block_diagonal:9", 5, 25},
      {"block_diagonal:1", 5, 5},
      {"rank_triu:2", 7, 2 * 7 + 5},
      {"rank_tril:7", 7, 49},
      {"rank_triu_topleft:1", 1, 1},
      {"hierarchical:2,3", 9, 5 * 9 + 4},
      {"hierarchical:2,3", 4, 4 * 4},  // the tail keeps the 2 that fit
      {"hierarchical:4,3", 4, 16},
      {"triu_toeplitz", 6, 6},
  };
  for (const Case& c : cases) {
    const Layout layout = make_layout(c.spec, c.dim);
    const std::string what = std::string(c.spec) + " of dimension " + std::to_string(c.dim);
    check_equal(storage_size(layout), c.size, what + ": size");
    int64_t total = 0;
    for (const Section& part : storage_sections(layout)) {
      check_equal(part.offset, total, what + ": offset of " + part.name);
      int64_t numbers = 1;
      for (const int64_t n : part.shape) numbers *= n;
      total += numbers;
    }
    check_equal(total, c.size, what + ": the sections fill the storage");
  }
}

}  // namespace

int main() {
  test_canonical_specs();
  test_bad_specs();
  test_sizes();
  return failures;
}
