// The parameter groups that SINGD trains itself: their options, and when their factors are due.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "group_step.h"
#include "known_options.h"
#include "python_references.h"

namespace singd {

// Whether the next step of a group updates the factors. Reads the group's own dictionary, which
// users may change at any time. Throws ValueError if its `T` or `steps` is no number of steps.
bool factors_are_due(const pybind11::dict& group);

class KnownGroups {
 public:
  explicit KnownGroups(const pybind11::object& optimizer) : optimizer_(optimizer) {}

  // Of a group that is in its place.
  void set_options(int index, const pybind11::dict& group, KnownOptions options);
  const KnownOptions& options(int index) const { return *groups_.at(index).options; }
  // Whether a group still has the options that were set.
  bool are_options_known(int index) const;
  std::shared_ptr<CallMemory> memory(int index) const { return groups_.at(index).memory; }

  // Python's code checks the options that were changed, and sets them. Throws if one is bad, or if
  // a group is not in its place or has other parameters.
  void check() const;
  // The next step of every group, without layers; after `check`.
  std::vector<GroupStep> steps(const std::shared_ptr<const Operators>& operators) const;
  void count_steps(int64_t count) const;

  // Whether the next step of a group updates the factors; T is checked.
  static bool are_due(const pybind11::object& optimizer, int index);
  // Groups of which it has changed since the last call whether compiled models are to be observed.
  std::vector<std::pair<int, bool>> changes_of_due(bool paused);

 private:
  WeakReference optimizer_;
  std::map<int, KnownGroup> groups_;  // by index
};

}  // namespace singd
