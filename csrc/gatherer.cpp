// From a layer's input and output gradient to its statistics, without Python on the way: the code
// runs cold, between matrix products, once a layer and backward pass. Whatever can be looked at
// once a pass is looked at then: `look_around`.
//
// And from a backward pass to the arguments of a step. The gatherer belongs to the optimizer; hooks
// and graphs hold it weakly.
#include "gatherer.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "group_step.h"
#include "known_groups.h"
#include "known_layer.h"
#include "observation.h"
#include "operators.h"
#include "remembered.h"

namespace py = pybind11;

namespace singd {
namespace {

// A Linear's input or output gradient as [batch, shared, features].
at::Tensor linear_rows(const at::Tensor& tensor) {
  if (tensor.dim() == 3) return tensor;
  if (tensor.dim() == 1) return tensor.view({1, 1, tensor.size(0)});
  const auto sizes = tensor.sizes();
  const int64_t shared = c10::multiply_integers(sizes.slice(1, sizes.size() - 2));
  return tensor.reshape({sizes.front(), shared, sizes.back()});
}

struct Shape {
  int64_t batch, shared;
};

// A layer's sums for one factor: new memory, if there are none yet.
struct Sums {
  at::Tensor factor, statistic;
  bool are_new;

  Sums(const KnownLayer& layer, const py::object& factor_key, const py::object& key)
      : factor(tensor_in(layer, layer.entries(), factor_key)),
        are_new(!find(layer.entries(), key)) {
    if (!are_new) {
      statistic = tensor_in(layer, layer.entries(), key);
      return;
    }
    const bool is_double = factor.scalar_type() == at::kDouble;
    statistic =
        at::empty(factor.sizes(), factor.options().dtype(is_double ? at::kDouble : at::kFloat));
  }
};

// Whether no parameter has a gradient.
bool is_clear(const KnownLayer& layer) {
  return std::none_of(layer.parameters.begin(), layer.parameters.end(),
                      [](const WeakTensor& parameter) {
                        const at::Tensor tensor = parameter.get();
                        return tensor.defined() && tensor.grad().defined();
                      });
}

class Gatherer {
 public:
  // name_space() is that of the operators; follow(optimizer, layer) is called if a layer's
  // parameters are elsewhere or of another type, and check_owned(layer) if they may not be those of
  // its modules any more.
  Gatherer(const py::object& optimizer, py::function name_space, py::function follow,
           py::function check_owned)
      : groups(optimizer),
        optimizer_(optimizer),
        name_space_(std::move(name_space)),
        follow_(std::move(follow)),
        check_owned_(std::move(check_owned)) {}

  KnownGroups groups;
  bool paused = false;     // passes are ignored
  bool unsettled = false;  // the optimizer's settle_steps() is to be called before forward passes

  int add(const py::object& layer, std::string structure_K, std::string structure_C,
          bool is_linear) {
    layers_.push_back(std::make_shared<KnownLayer>(layer, std::move(structure_K),
                                                   std::move(structure_C), is_linear));
    return static_cast<int>(layers_.size()) - 1;
  }

  // Lets all states go, since others take their place.
  void unbind() {
    for (const auto& layer : layers_) layer->unbind();
    pass_ = -1;
  }

  // The steps of all groups. Throws if one cannot be done.
  std::vector<GroupStep> steps() {
    const at::NoGradGuard no_grad;
    look_around();
    std::vector<GroupStep> steps = groups.steps(operators_);
    for (GroupStep& step : steps) collect(step);
    return steps;
  }

  // Of all layers, or of those alone whose gradients were cleared.
  void forget_statistics(const py::dict& optimizer_state, bool of_all) {
    StateFinder states(optimizer_state);
    for (const auto& layer : layers_) {
      if (!layer->has_statistics || !(of_all || is_clear(*layer))) continue;
      layer->bind(states);
      layer->forget_statistics();
    }
  }

  KnownLayer& layer(int index) { return *layers_.at(index); }

  // Whether the forward pass of a layer that runs is needed by an update of its factors.
  bool is_due(const KnownLayer& layer) const;

  // Adds one call's input and output gradient; `hook` is asked for what is not of a Linear.
  void receive(KnownLayer& layer, const at::Tensor& x, const at::Tensor& g, int64_t pass,
               const py::object& hook);

 private:
  // From now on the groups' options are known, and where everything is: the states of all layers,
  // and the operators.
  void look_around();
  void collect(GroupStep& step);
  void follow(KnownLayer& layer);
  void begin(KnownLayer& layer, int64_t pass);
  Shape add_linear(KnownLayer& layer, const at::Tensor& x, const at::Tensor& g) const;
  Shape add_others(KnownLayer& layer, const at::Tensor& x, const at::Tensor& g,
                   const py::object& hook) const;
  void count(KnownLayer& layer, Shape shape) const;

  WeakReference optimizer_;
  py::function name_space_, follow_, check_owned_;
  KnownLayers layers_;
  int64_t pass_ = -1;  // that looked around last
  std::shared_ptr<const Operators> operators_;
  Remembered last_step_;
};

bool Gatherer::is_due(const KnownLayer& layer) const {
  const py::object optimizer = optimizer_.get();
  if (optimizer.is_none()) return false;
  if (unsettled) optimizer.attr("settle_steps")();
  return groups.are_due(optimizer, layer.group);
}

void Gatherer::look_around() {
  static const auto* const state = new py::object(interned("state"));  // Python may be gone first
  last_step_.ask();
  groups.check();
  // Anew each time: an operator of this name may have been registered in the place of another.
  operators_ = std::make_shared<const Operators>(name_space_().cast<std::string>());
  StateFinder states(py::getattr(optimizer_.get(), *state));
  for (const auto& layer : layers_) {
    follow(*layer);
    layer->bind(states);
  }
}

// Three updates in a row that a layer misses, though steps between them use it, are no chance.
void note_use(KnownLayer& layer, bool is_used, GroupStep& step) {
  constexpr int kReported = 3;
  if (!step.lr_cov.has_value()) {
    layer.was_used |= is_used;
    return;
  }
  layer.missed_updates = is_used ? 0 : layer.missed_updates + static_cast<int>(layer.was_used);
  if (layer.missed_updates == kReported && layer.was_used)
    step.factors.missed.push_back(layer.name);
  layer.was_used = false;
}

void Gatherer::collect(GroupStep& step) {
  const bool factors_are_due = step.lr_cov.has_value();
  step.reserve(layers_.size());
  if (factors_are_due) step.factors.reserve(layers_.size());
  for (const auto& layer : layers_) {
    if (layer->group != step.group) continue;
    const size_t gradients = count_gradients(*layer);
    const bool matters = gradients < layer->parameters.size() || factors_are_due;
    if (matters && !layer->is_owned()) check_owned_(layer->python.get());
    note_use(*layer, gradients > 0, step);
    if (gradients == 0) continue;
    step.add(layer);
    if (factors_are_due) step.factors.add(layer, step.options->has_factor_momenta());
  }
  last_step_.add(step);
}

void Gatherer::follow(KnownLayer& layer) {
  const at::Tensor parameter = layer.parameters.front().get();
  if (parameter.scalar_type() == layer.dtype && parameter.device() == layer.device) return;
  follow_(optimizer_.get(), layer.python.get());
  layer.dtype = parameter.scalar_type();
  layer.device = parameter.device();
}

// Notes the current backward pass. Where earlier passes have left no gradients, these were cleared
// (by `model.zero_grad()`, say), and their statistics go the same way.
void Gatherer::begin(KnownLayer& layer, int64_t pass) {
  layer.last_pass = pass;
  layer.counted_terms = 0;
  layer.pass_counts = accumulates(layer.parameters);
  if (layer.pass_counts && is_clear(layer)) layer.forget_statistics();
}

Shape Gatherer::add_linear(KnownLayer& layer, const at::Tensor& x, const at::Tensor& g) const {
  static const std::string expand = "expand", mean = "mean", sum = "sum";
  const Keys& keys = layer.keys;
  Sums of_C(layer, keys.C, keys.statistic_C), of_K(layer, keys.K, keys.statistic_K);
  const bool reduce = groups.options(layer.group).reduce;
  const at::Tensor inputs = linear_rows(x), gradients = linear_rows(g);
  {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView guard;
    operators_->accumulate_statistic_.call(of_C.statistic, gradients, of_C.factor, layer.dim_C,
                                           layer.structure_C, false, reduce ? sum : expand,
                                           of_C.are_new);
    operators_->accumulate_statistic_.call(of_K.statistic, inputs, of_K.factor, layer.dim_K,
                                           layer.structure_K, layer.has_bias,
                                           reduce ? mean : expand, of_K.are_new);
  }
  // New memory becomes state once it holds something.
  if (of_C.are_new) layer.entries()[keys.statistic_C] = of_C.statistic;
  if (of_K.are_new) layer.entries()[keys.statistic_K] = of_K.statistic;
  return {gradients.size(0), gradients.size(1)};
}

// Python's code adds the rows, to sums that are there.
Shape Gatherer::add_others(KnownLayer& layer, const at::Tensor& x, const at::Tensor& g,
                           const py::object& hook) const {
  const Keys& keys = layer.keys;
  for (const auto& [factor, key] :
       {std::pair(&keys.C, &keys.statistic_C), std::pair(&keys.K, &keys.statistic_K)}) {
    const Sums sums(layer, *factor, *key);
    if (sums.are_new) layer.entries()[*key] = sums.statistic.zero_();
  }
  const auto [batch, shared] = hook.attr("add_rows")(x, g).cast<std::pair<int64_t, int64_t>>();
  return {batch, shared};
}

// Counts rows, and the terms that the loss averages over, so that micro-batches make one big batch.
// Uses of a layer within one backward pass see the same terms: they are counted once. A loss that
// is a sum has the factor 1, however many passes there are.
void Gatherer::count(KnownLayer& layer, Shape shape) const {
  const KnownOptions& options = groups.options(layer.group);
  const auto [batch, shared] = shape;
  py::dict& state = layer.entries();
  const int64_t rows = batch * (options.reduce ? std::min<int64_t>(1, shared) : shared);
  state[layer.keys.rows] = number_in(state, layer.keys.rows) + rows;
  if (options.loss_average.empty()) {
    state[layer.keys.loss_terms] = 1;
    return;
  }
  const int64_t terms = options.loss_average == "batch+sequence" ? batch * shared : batch;
  const int64_t more = std::max<int64_t>(0, terms - layer.counted_terms);
  state[layer.keys.loss_terms] = number_in(state, layer.keys.loss_terms) + more;
  layer.counted_terms += more;
}

void Gatherer::receive(KnownLayer& layer, const at::Tensor& x, const at::Tensor& g, int64_t pass,
                       const py::object& hook) {
  if (paused) return;
  if (pass != pass_) {
    look_around();
    pass_ = pass;
  }
  if (pass != layer.last_pass) begin(layer, pass);
  if (!layer.pass_counts) return;
  layer.has_statistics = true;
  try {
    count(layer, layer.is_linear ? add_linear(layer, x, g) : add_others(layer, x, g, hook));
  } catch (const c10::ValueError& error) {
    TORCH_CHECK_VALUE(false, "layer '", layer.name, "': ", error.what_without_backtrace());
  }
}

// What the hook of one module of a layer hands its calls to.
class LayerReceiver : public Receiver, public std::enable_shared_from_this<LayerReceiver> {
 public:
  // Not `input_is_first`: hook.input_of(args, kwargs, output) says what the input of a call is.
  LayerReceiver(const std::shared_ptr<Gatherer>& gatherer, int layer, const py::object& hook,
                bool input_is_first)
      : gatherer_(gatherer), layer_(layer), hook_(hook), input_is_first_(input_is_first) {}

  // Observes the output of a module that was called, if the next factor update needs it.
  void watch(const py::tuple& args, const py::dict& kwargs, const py::object& output) {
    const auto gatherer = gatherer_.lock();
    if (!gatherer || !at::GradMode::is_enabled()) return;
    const KnownLayer& layer = gatherer->layer(layer_);
    if (!THPVariable_Check(output.ptr())) hook_.get().attr("check_output")(output);
    const auto y = output.cast<at::Tensor>();
    if (!y.requires_grad() || !gatherer->is_due(layer)) return;
    observe(y, input(args, kwargs, output, y), shared_from_this(), !gatherer->paused);
  }

  void receive(const at::Tensor& x, const at::Tensor& g, int64_t backward_pass) override {
    const auto gatherer = gatherer_.lock();
    const py::object hook = hook_.get();
    if (!gatherer || hook.is_none()) return;
    gatherer->receive(gatherer->layer(layer_), x, g, backward_pass, hook);
  }

 private:
  at::Tensor input(const py::tuple& args, const py::dict& kwargs, const py::object& output,
                   const at::Tensor& y) const {
    if (input_is_first_ && !args.empty() && THPVariable_Check(args[0].ptr())) {
      const auto x = py::object(args[0]).cast<at::Tensor>();
      if (x.scalar_type() == y.scalar_type()) return x;
    }
    return hook_.get().attr("input_of")(args, kwargs, output).cast<at::Tensor>();
  }

  std::weak_ptr<Gatherer> gatherer_;
  int layer_;
  WeakReference hook_;
  bool input_is_first_;
};

}  // namespace

void define_gatherer(py::module_& m) {
  m.def("linear_rows", &linear_rows, py::arg("tensor"));
  m.def("is_due", &factors_are_due, py::arg("group"));
  py::class_<Gatherer, std::shared_ptr<Gatherer>>(m, "Gatherer")
      .def(py::init<const py::object&, py::function, py::function, py::function>(),
           py::arg("optimizer"), py::arg("namespace"), py::arg("follow"), py::arg("check_owned"))
      .def_readwrite("paused", &Gatherer::paused)
      .def_readwrite("unsettled", &Gatherer::unsettled)
      .def("add", &Gatherer::add, py::arg("layer"), py::arg("structure_K"), py::arg("structure_C"),
           py::arg("is_linear"))
      .def(
          "set_options",
          [](Gatherer& self, int index, const py::dict& group, const py::dict& options) {
            self.groups.set_options(index, group, KnownOptions(group, options));
          },
          py::arg("index"), py::arg("group"), py::arg("options"))
      .def(
          "are_options_known",
          [](const Gatherer& self, int index) { return self.groups.are_options_known(index); },
          py::arg("index"))
      .def(
          "memory", [](const Gatherer& self, int index) { return self.groups.memory(index); },
          py::arg("index"))
      .def("unbind", &Gatherer::unbind)
      .def("steps", &Gatherer::steps)
      .def("count_steps",
           [](const Gatherer& self, int64_t count) { self.groups.count_steps(count); })
      .def("changes_of_due", [](Gatherer& self) { return self.groups.changes_of_due(self.paused); })
      .def("forget_statistics", &Gatherer::forget_statistics, py::arg("state"), py::arg("of_all"));
  py::class_<LayerReceiver, std::shared_ptr<LayerReceiver>>(m, "LayerReceiver")
      .def(py::init<const std::shared_ptr<Gatherer>&, int, const py::object&, bool>(),
           py::arg("gatherer"), py::arg("layer"), py::arg("hook"), py::arg("input_is_first"))
      .def("watch", &LayerReceiver::watch, py::arg("args"), py::arg("kwargs"), py::arg("output"))
      .def("receive", &LayerReceiver::receive, py::arg("x"), py::arg("g"),
           py::arg("backward_pass"));
}

}  // namespace singd
