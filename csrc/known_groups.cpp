#include "known_groups.h"

#include "known_layer.h"

namespace py = pybind11;

namespace singd {
namespace {

// What is asked of an optimizer.
struct Names {
  py::object param_groups = interned("param_groups"), steps = interned("steps"), T = interned("T"),
             options = interned("options");
  static const Names& once() {
    static const Names* const names = new Names();  // never destroyed: Python may be gone by then
    return *names;
  }
};

py::list groups_of(const py::object& optimizer) {
  return py::getattr(optimizer, Names::once().param_groups);
}

}  // namespace

bool factors_are_due(const py::dict& group) {
  const Names& names = Names::once();
  return find(group, names.steps).cast<int64_t>() % find(group, names.T).cast<int64_t>() == 0;
}

bool KnownGroups::are_options_known(int index) const {
  return options(index).are_in(groups_of(optimizer_.get())[index]);
}

void KnownGroups::check() const {
  const py::object optimizer = optimizer_.get();
  const py::list groups = groups_of(optimizer);
  for (const auto& [index, group] : groups_) {
    const KnownOptions& known = *group.options;
    if (known.may_change_in_place || !known.are_in(groups[index])) {
      py::getattr(optimizer, Names::once().options)(index);
    }
  }
}

std::vector<GroupStep> KnownGroups::steps(const std::shared_ptr<const Operators>& operators) const {
  const py::object optimizer = optimizer_.get();
  const py::list groups = groups_of(optimizer);
  std::vector<GroupStep> steps;
  steps.reserve(groups_.size());
  for (const auto& [index, known] : groups_) {
    const py::dict group = groups[index];
    steps.emplace_back(operators, index, known, number_in(group, Names::once().steps));
    GroupStep& step = steps.back();
    if (!factors_are_due(group)) continue;
    const auto& number = step.options->lr_cov;
    step.lr_cov =
        number ? *number : optimizer.attr("_lr_cov_at")(index, step.number).cast<double>();
  }
  return steps;
}

void KnownGroups::count_steps(int64_t count) const {
  const py::object& key = Names::once().steps;
  const py::list groups = groups_of(optimizer_.get());
  for (const auto& [index, known] : groups_) {
    py::dict group = groups[index];
    group[key] = number_in(group, key) + count;
  }
}

bool KnownGroups::are_due(const py::object& optimizer, int index) {
  const py::dict group = groups_of(optimizer)[index];
  const py::handle T = find(group, Names::once().T);
  // Another value is a bad option, which Python names.
  if (!PyLong_CheckExact(T.ptr()) || T.cast<int64_t>() < 1) {
    return optimizer.attr("factors_due")(index).cast<bool>();
  }
  return factors_are_due(group);
}

std::vector<std::pair<int, bool>> KnownGroups::changes_of_due(bool paused) {
  std::vector<std::pair<int, bool>> changes;
  const py::object optimizer = optimizer_.get();
  for (const auto& [index, known] : groups_) {
    const bool due = !paused && are_due(optimizer, index);
    if (known.marked_due != due) changes.emplace_back(index, due);
  }
  for (const auto& [index, due] : changes) groups_[index].marked_due = due;
  return changes;
}

}  // namespace singd
