#include "known_groups.h"

#include <string>

#include "known_layer.h"

namespace py = pybind11;

namespace singd {
namespace {

// What is asked of an optimizer.
struct Names {
  py::object param_groups = interned("param_groups"), params = interned("params"),
             steps = interned("steps"), T = interned("T"), options = interned("options");
  static const Names& once() {
    static const Names* const names = new Names();  // never destroyed: Python may be gone by then
    return *names;
  }
};

py::list groups_of(const py::object& optimizer) {
  return py::getattr(optimizer, Names::once().param_groups);
}

[[noreturn]] void refuse(int index, const std::string& what) {
  throw py::value_error(
      "optimizer.param_groups[" + std::to_string(index) + "] " + what +
      ": the groups of SINGD and their parameters stay as they were added; change "
      "options in place, and construct SINGD again for other parameters");
}

py::dict group_at(const py::list& groups, int index) {
  if (static_cast<size_t>(index) >= groups.size()) refuse(index, "was removed");
  return groups[static_cast<size_t>(index)];
}

// A number of steps in a group.
int64_t steps_in(const py::dict& group, const py::object& key) {
  const py::handle value = find(group, key);
  if (value && PyIndex_Check(value.ptr())) {  // NumPy's integers too
    const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
    if (overflow == 0) return number;
  }
  throw py::value_error("'" + key.cast<std::string>() + "' of a parameter group is " +
                        (value ? py::repr(value).cast<std::string>() : "missing") +
                        "; it must be an integer below 2**63");
}

std::vector<const PyObject*> parameters_in(const py::dict& group) {
  const py::handle params = find(group, Names::once().params);
  std::vector<const PyObject*> result;
  if (!params || !PyList_Check(params.ptr())) return result;
  for (const py::handle parameter : py::reinterpret_borrow<py::list>(params)) {
    result.push_back(parameter.ptr());
  }
  return result;
}

}  // namespace

bool factors_are_due(const py::dict& group) {
  const Names& names = Names::once();
  return steps_in(group, names.steps) % steps_in(group, names.T) == 0;
}

void KnownGroups::set_options(int index, const py::dict& group, KnownOptions options) {
  KnownGroup& known = groups_[index];
  known.options = std::make_shared<const KnownOptions>(std::move(options));
  known.parameters = parameters_in(group);
}

bool KnownGroups::are_options_known(int index) const {
  return options(index).are_in(group_at(groups_of(optimizer_.get()), index));
}

void KnownGroups::check() const {
  const py::object optimizer = optimizer_.get();
  const py::list groups = groups_of(optimizer);
  for (const auto& [index, known_group] : groups_) {
    const py::dict group = group_at(groups, index);
    if (parameters_in(group) != known_group.parameters) refuse(index, "has other parameters");
    const KnownOptions& known = *known_group.options;
    if (known.may_change_in_place || !known.are_in(group)) {
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
    const py::dict group = group_at(groups, index);
    steps.emplace_back(operators, index, known, steps_in(group, Names::once().steps));
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
    py::dict group = group_at(groups, index);
    group[key] = steps_in(group, key) + count;
  }
}

bool KnownGroups::are_due(const py::object& optimizer, int index) {
  const py::dict group = group_at(groups_of(optimizer), index);
  const py::handle T = find(group, Names::once().T);
  // Another value is a bad option, which Python names.
  if (!T || !PyLong_CheckExact(T.ptr()) || steps_in(group, Names::once().T) < 1) {
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
