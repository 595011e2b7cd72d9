#include "spec.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "registry.h"

namespace singd {
namespace {

using Sizes = std::vector<int64_t>;

// One line a structure: its name, its sizes when none are given, and the layout they mean.
struct Structure {
  const char* name;
  Sizes default_sizes;
  Layout (*layout)(int64_t dim, const Sizes& sizes);
};

Layout dense(int64_t dim, Triangle triangle) {
  Layout layout;
  layout.family = Family::kDense;
  layout.dim = dim;
  layout.triangle = triangle;
  return layout;
}

Layout diagonal(int64_t dim) {
  Layout layout;
  layout.family = Family::kDiagonal;
  layout.dim = dim;
  return layout;
}

Layout block_diagonal(int64_t dim, int64_t block) {
  if (block >= dim) return dense(dim, Triangle::kFull);
  if (block == 1) return diagonal(dim);
  Layout layout;
  layout.family = Family::kBlockDiagonal;
  layout.dim = dim;
  layout.block = block;
  return layout;
}

Layout bordered(int64_t dim, int64_t head, int64_t tail, bool transposed) {
  if (head >= dim || (head == 0 && tail >= dim)) return dense(dim, Triangle::kFull);
  Layout layout;
  layout.family = Family::kBordered;
  layout.dim = dim;
  layout.head = head;
  layout.tail = std::min(tail, dim - head);
  layout.transposed = transposed;
  return layout;
}

Layout toeplitz(int64_t dim, bool lower) {
  Layout layout;
  layout.family = Family::kToeplitz;
  layout.dim = dim;
  layout.transposed = lower;
  return layout;
}

const std::vector<Structure>& structures() {
  static const std::vector<Structure> table = {
      {"dense", {}, [](int64_t d, const Sizes&) { return dense(d, Triangle::kFull); }},
      {"tril", {}, [](int64_t d, const Sizes&) { return dense(d, Triangle::kLower); }},
      {"triu", {}, [](int64_t d, const Sizes&) { return dense(d, Triangle::kUpper); }},
      {"diagonal", {}, [](int64_t d, const Sizes&) { return diagonal(d); }},
      {"block_diagonal", {32}, [](int64_t d, const Sizes& k) { return block_diagonal(d, k[0]); }},
      {"rank_triu", {1}, [](int64_t d, const Sizes& k) { return bordered(d, k[0], 0, false); }},
      {"rank_tril", {1}, [](int64_t d, const Sizes& k) { return bordered(d, k[0], 0, true); }},
      {"rank_triu_topleft",
       {1},
       [](int64_t d, const Sizes& k) { return bordered(d, 0, k[0], true); }},
      {"rank_tril_topleft",
       {1},
       [](int64_t d, const Sizes& k) { return bordered(d, 0, k[0], false); }},
      {"hierarchical",
       {16, 16},
       [](int64_t d, const Sizes& k) { return bordered(d, k[0], k[1], false); }},
      {"triu_toeplitz", {}, [](int64_t d, const Sizes&) { return toeplitz(d, false); }},
      {"tril_toeplitz", {}, [](int64_t d, const Sizes&) { return toeplitz(d, true); }},
  };
  return table;
}

// Names that PyPI `singd` gives to some of these structures.
const std::vector<std::pair<const char*, const char*>>& aliases() {
  static const std::vector<std::pair<const char*, const char*>> table = {
      {"block30diagonal", "block_diagonal:30"},
      {"hierarchical15_15", "hierarchical:15,15"},
      {"triltoeplitz", "tril_toeplitz"},
      {"triutoeplitz", "triu_toeplitz"},
  };
  return table;
}

[[noreturn]] void fail(const std::string& spec, const std::string& why) {
  std::string allowed;
  for (const Structure& s : structures()) {
    if (!allowed.empty()) allowed += ", ";
    allowed += s.name;
    for (size_t i = 0; i < s.default_sizes.size(); ++i) {
      allowed += i == 0 ? ":k" : ",k";
      if (s.default_sizes.size() > 1) allowed += std::to_string(i + 1);
    }
  }
  throw std::invalid_argument("structure '" + spec + "' " + why + "; allowed are " + allowed +
                              " (sizes k are integers >= 1 and may be left out)");
}

// Parses "15,15"; every size is an integer from 1 to 2^31 - 1.
Sizes parse_sizes(const std::string& spec, const std::string& text) {
  Sizes sizes(1, 0);
  int digits = 0;
  for (const char c : text + ",") {
    if (c == ',') {
      if (digits == 0 || digits > 10 || sizes.back() < 1 || sizes.back() > INT32_MAX) {
        fail(spec, "has a bad size in '" + text + "'");
      }
      sizes.push_back(0);
      digits = 0;
    } else if (c >= '0' && c <= '9') {
      if (++digits <= 10) sizes.back() = 10 * sizes.back() + (c - '0');
    } else {
      fail(spec, "has a bad size in '" + text + "'");
    }
  }
  sizes.pop_back();
  return sizes;
}

struct Parsed {
  const Structure* structure;
  Sizes sizes;
};

Parsed parse_text(const std::string& spec) {
  std::string text = spec;
  for (const auto& [alias, meaning] : aliases()) {
    if (spec == alias) text = meaning;
  }
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  for (const Structure& s : structures()) {
    if (name != s.name) continue;
    if (colon == std::string::npos) return {&s, s.default_sizes};
    const Sizes sizes = parse_sizes(spec, text.substr(colon + 1));
    if (sizes.size() != s.default_sizes.size()) {
      fail(spec, "takes " + std::to_string(s.default_sizes.size()) + " sizes, not " +
                     std::to_string(sizes.size()));
    }
    return {&s, sizes};
  }
  fail(spec, "is unknown");
}

// Operators parse the same few specs for every layer of every step.
const Parsed& parse(const std::string& spec) {
  thread_local std::unordered_map<std::string, Parsed> known;
  const auto found = known.find(spec);
  return found != known.end() ? found->second : known.emplace(spec, parse_text(spec)).first->second;
}

}  // namespace

std::string canonical_spec(const std::string& spec) {
  const Parsed& parsed = parse(spec);
  std::string text = parsed.structure->name;
  for (size_t i = 0; i < parsed.sizes.size(); ++i) {
    text += (i == 0 ? ":" : ",") + std::to_string(parsed.sizes[i]);
  }
  return text;
}

Layout make_layout(const std::string& spec, int64_t dim) {
  const Parsed& parsed = parse(spec);
  constexpr int64_t kBeyond = int64_t{1} << 31;  // whose square fits 64 bits
  if (dim < 1 || dim >= kBeyond) {
    throw std::invalid_argument("structure '" + spec +
                                "' needs a dimension of at least 1 and below 2**31, not " +
                                std::to_string(dim));
  }
  return parsed.structure->layout(dim, parsed.sizes);
}

int64_t storage_size(const Layout& layout) {
  return visit(layout, [](const auto& family) { return family.size(); });
}

std::vector<Section> storage_sections(const Layout& layout) {
  return visit(layout, [](const auto& family) { return family.sections(); });
}

std::vector<int64_t> diagonal_slots(const Layout& layout) {
  return visit(layout, [](const auto& family) {
    std::vector<int64_t> slots;
    family.for_each_diagonal([&](int64_t slot) { slots.push_back(slot); });
    return slots;
  });
}

}  // namespace singd
