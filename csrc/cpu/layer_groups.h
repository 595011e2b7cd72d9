// Layers that a step reads, then writes, while a cache has their gradients.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "arena.h"

namespace singd::cpu {

// Layers [begin, end).
struct LayerGroup {
  size_t begin = 0, end = 0;
};

class LayerGroups {
 public:
  // Of so many layers in their order: elements(begin, end) of a group, unless it is a single layer,
  // are at most kMost.
  template <class Elements>
  void plan(size_t layers, Elements elements) {
    for (size_t begin = 0; begin < layers; begin = groups_.back().end) {
      size_t end = begin + 1;
      while (end < layers && elements(begin, end + 1) <= kMost) ++end;
      groups_.push_back({begin, end});
    }
  }

  int64_t count() const { return static_cast<int64_t>(groups_.size()); }

  // One of them, or an empty one before the first and behind the last.
  LayerGroup at(int64_t index) const {
    return index >= 0 && index < count() ? groups_[static_cast<size_t>(index)] : LayerGroup{};
  }

  // plan(group, arena) for all, in memory that every kTurns-th of them shares.
  template <int kTurns, class Plan>
  void take_turns(Arena& arena, Plan plan) const {
    int64_t needed[kTurns] = {};
    for (size_t g = 0; g < groups_.size(); ++g) {
      int64_t& most = needed[g % kTurns];
      most = std::max(most, Arena::size([&](Arena& own) { plan(groups_[g], own); }));
    }
    std::byte* memory[kTurns];
    for (int i = 0; i < kTurns; ++i) memory[i] = arena.take<std::byte>(needed[i]);
    for (size_t g = 0; g < groups_.size(); ++g) {
      Arena own(memory[g % kTurns]);
      plan(groups_[g], own);
    }
  }

 private:
  // Gradients of a group should fit a cache, and what is kept of them is little memory.
  static constexpr int64_t kMost = int64_t{1} << 18;

  std::vector<LayerGroup> groups_;
};

}  // namespace singd::cpu
