// The patterns for kernels say what the families' for_each_entry says.
#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "../structures/pattern.h"
#include "../structures/registry.h"
#include "../structures/spec.h"
#include "check.h"

using namespace singd;
using tests::check;
using tests::check_equal;

namespace {

template <class Pattern>
void compare(const Layout& layout, const Pattern& pattern, const std::string& what) {
  const bool toeplitz = layout.family == Family::kToeplitz;
  check_equal(pattern.size(), storage_size(layout), what + ": size");
  std::map<std::pair<int64_t, int64_t>, std::pair<int64_t, int>> entries;  // of R
  visit(layout, [&](const auto& family) {
    family.for_each_entry([&](int64_t slot, int64_t i, int64_t j, int weight) {
      entries[layout.transposed ? std::pair(j, i) : std::pair(i, j)] = {slot, weight};
    });
  });
  std::vector<std::vector<int64_t>> rows(layout.dim), columns(layout.dim);
  for (int64_t i = 0; i < layout.dim; ++i) {
    for (int64_t j = 0; j < layout.dim; ++j) {
      const auto entry = entries.find({i, j});
      const int64_t expected = entry == entries.end() ? -1 : entry->second.first;
      const std::string where = what + " at (" + std::to_string(i) + ", " + std::to_string(j) + ")";
      check_equal(pattern.slot(i, j), expected, where + ": slot");
      if (expected < 0) continue;
      rows[i].push_back(j);
      columns[j].push_back(i);
      check_equal(pattern.weight(i, j), entry->second.second, where + ": weight");
      const Position p = pattern.position(expected);
      check(toeplitz ? p.row == 0 && p.column == j - i : p.row == i && p.column == j,
            where + ": position");
    }
  }
  for (int64_t i = 0; i < layout.dim; ++i) {
    const std::string where = what + " line " + std::to_string(i);
    std::vector<int64_t> row, column;
    for (int64_t n = 0; n < pattern.row_length(i); ++n) row.push_back(pattern.row_column(i, n));
    for (int64_t n = 0; n < pattern.column_length(i); ++n) {
      column.push_back(pattern.column_row(i, n));
    }
    std::sort(column.begin(), column.end());  // a diagonal entry comes after the border
    check(row == rows[i], where + ": row");
    check(column == columns[i], where + ": column");
  }
}

}  // namespace

int main() {
  const std::vector<std::string> specs = {"dense",
                                          "tril",
                                          "triu",
                                          "diagonal",
                                          "block_diagonal:1",
                                          "block_diagonal:3",
                                          "rank_triu:1",
                                          "rank_tril:2",
                                          "rank_triu_topleft:2",
                                          "rank_tril_topleft:3",
                                          "hierarchical:2,3",
                                          "hierarchical:1,1",
                                          "triu_toeplitz",
                                          "tril_toeplitz"};
  for (const std::string& spec : specs) {
    for (int64_t dim : {1, 2, 3, 4, 5, 6, 7, 9, 12, 13}) {
      const Layout layout = make_layout(spec, dim);
      const std::string what = spec + ", dimension " + std::to_string(dim);
      visit_pattern(layout, [&](const auto& pattern) { compare(layout, pattern, what); });
    }
  }
  return tests::failures;
}
