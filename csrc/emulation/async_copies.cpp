#include "async_copies.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "block.h"

namespace singd::emulation {

namespace {

struct Copy {
  int group;
  void* to;
  unsigned char bytes[kCopyBytes];
};

struct Copies {
  int group = 0;  // that is not yet ended
  std::vector<Copy> begun;
};

Copies copies[kMaxThreads];

}  // namespace

void begin_copy(void* to, const void* from) {
  Copies& own = copies[self()];
  Copy copy{own.group, to, {}};
  if (from != nullptr) std::memcpy(copy.bytes, from, kCopyBytes);
  own.begun.push_back(copy);
  std::memset(to, 0xFF, kCopyBytes);
}

void commit_copies() { ++copies[self()].group; }

void land_copies(int groups) {
  Copies& own = copies[self()];
  const auto first_left = std::find_if(own.begun.begin(), own.begun.end(), [&](const Copy& copy) {
    return copy.group >= own.group - groups;
  });
  for (auto copy = own.begun.begin(); copy != first_left; ++copy) {
    std::memcpy(copy->to, copy->bytes, kCopyBytes);
  }
  own.begun.erase(own.begun.begin(), first_left);
}

void forget_copies() {
  for (Copies& own : copies) {
    own.group = 0;
    own.begun.clear();
  }
}

bool copies_landed(int thread) { return copies[thread].begun.empty(); }

}  // namespace singd::emulation
