// Structure specs as users write them ("block_diagonal:30"), and the layouts they mean.
#pragma once

#include <string>
#include <vector>

#include "layout.h"

namespace singd {

// A named part of the flat storage: a dense array of the given shape that starts at `offset`.
struct Section {
  std::string name;
  int64_t offset;
  std::vector<int64_t> shape;
};

// The spec with aliases resolved and default sizes written out: "block30diagonal" is
// "block_diagonal:30". Throws std::invalid_argument, naming the spec and what is allowed.
std::string canonical_spec(const std::string& spec);

// The layout of a dim x dim factor with this spec. A block, or the border of a rank form, at least
// as wide as the factor is dense. Throws std::invalid_argument for an unknown spec or dim < 1.
Layout make_layout(const std::string& spec, int64_t dim);

// The number of stored entries, and the named parts they form.
int64_t storage_size(const Layout& layout);
std::vector<Section> storage_sections(const Layout& layout);

// The slots of the diagonal entries: dim of them, or one that all diagonal entries share.
std::vector<int64_t> diagonal_slots(const Layout& layout);

}  // namespace singd
