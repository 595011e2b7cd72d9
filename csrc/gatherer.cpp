// From a layer's input and output gradient to its statistics, without Python on the way: the code
// runs cold, between matrix products, once a layer and backward pass. Whatever can be looked at
// once a pass is left to `begin_pass` of curvature.py.
//
// The statistics live in the optimizer's state, a dictionary a layer, where checkpoints find them.
// The gatherer belongs to the optimizer; hooks and graphs hold it weakly.
#include "gatherer.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "observation.h"

namespace py = pybind11;

namespace singd {
namespace {

using AccumulateStatistic = void(at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                                 const std::string&, bool, const std::string&);

// A Linear's input or output gradient as [batch, shared, features].
at::Tensor linear_rows(const at::Tensor& tensor) {
  if (tensor.dim() == 3) return tensor;
  if (tensor.dim() == 1) return tensor.view({1, 1, tensor.size(0)});
  const auto sizes = tensor.sizes();
  const int64_t shared = c10::multiply_integers(sizes.slice(1, sizes.size() - 2));
  return tensor.reshape({sizes.front(), shared, sizes.back()});
}

// What is asked of a parameter group's options.
struct GroupOptions {
  std::string structure_K, structure_C;
  bool reduce;               // KFAC-reduce
  std::string loss_average;  // empty for a sum
};

// A key as Python's own code has it: comparing the two takes no look at their letters.
py::object interned(const std::string& key) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(key.c_str()));
}

// What is asked of an optimizer.
struct Names {
  py::object param_groups = interned("param_groups"), steps = interned("steps"), T = interned("T");
  static const Names& once() {
    static const Names* const names = new Names();  // never destroyed: Python may be gone by then
    return *names;
  }
};

// Keys of the entries in a layer's state.
struct Keys {
  py::object K, C, statistic_K, statistic_C, rows, loss_terms;
  explicit Keys(const std::string& prefix)
      : K(interned(prefix + "K")),
        C(interned(prefix + "C")),
        statistic_K(interned(prefix + "statistic_K")),
        statistic_C(interned(prefix + "statistic_C")),
        rows(interned(prefix + "rows")),
        loss_terms(interned(prefix + "loss_terms")) {}
};

struct GatheredLayer {
  int group;
  std::vector<WeakTensor> parameters;
  Keys keys;
  int64_t dim_K, dim_C;
  bool has_bias;
  bool is_linear;             // its rows are those of `linear_rows`; of others, Python makes them
  py::dict state{};           // bound in each backward pass
  int64_t last_pass = -1;     // the backward pass that last added to the statistics
  int64_t counted_terms = 0;  // loss terms counted in it
  bool pass_counts = false;   // whether it adds to the layer's gradients
};

struct Shape {
  int64_t batch, shared;
};

// An entry, or null.
py::handle find(const py::dict& state, const py::object& key) {
  return PyDict_GetItemWithError(state.ptr(), key.ptr());
}

int64_t number_in(const py::dict& state, const py::object& key) {
  const py::handle number = find(state, key);
  return number ? number.cast<int64_t>() : 0;
}

// The layer's sums, zeros if there are none yet.
at::Tensor statistic(py::dict& state, const py::object& key, const at::Tensor& factor) {
  if (const py::handle sums = find(state, key)) return sums.cast<at::Tensor>();
  const bool is_double = factor.scalar_type() == at::kDouble;
  at::Tensor zeros =
      at::zeros(factor.sizes(), factor.options().dtype(is_double ? at::kDouble : at::kFloat));
  state[key] = zeros;
  return zeros;
}

// The layer's entries that statistics are made of.
struct Sums {
  at::Tensor K, C, statistic_K, statistic_C;
  explicit Sums(GatheredLayer& layer)
      : K(find(layer.state, layer.keys.K).cast<at::Tensor>()),
        C(find(layer.state, layer.keys.C).cast<at::Tensor>()),
        statistic_K(statistic(layer.state, layer.keys.statistic_K, K)),
        statistic_C(statistic(layer.state, layer.keys.statistic_C, C)) {}
};

class Gatherer {
 public:
  // begin_pass(optimizer) is called by every backward pass.
  Gatherer(const py::object& optimizer, py::function begin_pass)
      : optimizer_(optimizer), begin_pass_(std::move(begin_pass)) {}

  bool paused = false;     // passes are ignored
  bool unsettled = false;  // the optimizer's settle_steps() is to be called before forward passes

  int add(int group, const std::vector<at::Tensor>& parameters, const std::string& prefix,
          int64_t dim_K, int64_t dim_C, bool has_bias, bool is_linear) {
    layers_.push_back(
        std::make_unique<GatheredLayer>(GatheredLayer{group,
                                                      {parameters.begin(), parameters.end()},
                                                      Keys(prefix),
                                                      dim_K,
                                                      dim_C,
                                                      has_bias,
                                                      is_linear}));
    return static_cast<int>(layers_.size()) - 1;
  }

  void set_options(int group, GroupOptions options) {
    if (options_.size() <= static_cast<size_t>(group)) options_.resize(group + 1);
    options_[group] = std::move(options);
  }

  void bind(int layer, py::dict state) { layers_.at(layer)->state = std::move(state); }

  // Lets all states go, since others take their place.
  void unbind() {
    for (const auto& layer : layers_) layer->state = py::dict();
    pass_ = -1;
  }

  void set_operators(const std::string& name) {
    accumulate_ = c10::Dispatcher::singleton()
                      .findSchemaOrThrow((name + "::accumulate_statistic_").c_str(), "")
                      .typed<AccumulateStatistic>();
  }

  GatheredLayer& layer(int index) { return *layers_.at(index); }

  // Whether the next step of the layer's group updates the factors.
  bool is_due(const GatheredLayer& layer) const;

  // Adds one call's input and output gradient; `hook` is asked for what is not of a Linear.
  void receive(GatheredLayer& layer, const at::Tensor& x, const at::Tensor& g, int64_t pass,
               const py::object& hook);

 private:
  void begin(GatheredLayer& layer, int64_t pass);
  Shape add_linear(const GatheredLayer& layer, Sums sums, const at::Tensor& x,
                   const at::Tensor& g) const;
  void count(GatheredLayer& layer, Shape shape) const;

  WeakReference optimizer_;
  py::function begin_pass_;
  std::vector<std::unique_ptr<GatheredLayer>> layers_;
  std::vector<GroupOptions> options_;
  int64_t pass_ = -1;  // that the options are known of
  std::optional<c10::TypedOperatorHandle<AccumulateStatistic>> accumulate_;
};

// Reads the group's own dictionary, which users may change at any time.
bool is_due(const py::dict& group) {
  const Names& names = Names::once();
  return find(group, names.steps).cast<int64_t>() % find(group, names.T).cast<int64_t>() == 0;
}

bool Gatherer::is_due(const GatheredLayer& layer) const {
  const Names& names = Names::once();
  const py::object optimizer = optimizer_.get();
  if (optimizer.is_none()) return false;
  if (unsettled) optimizer.attr("settle_steps")();
  const py::object groups = py::getattr(optimizer, names.param_groups);
  const py::dict group = py::list(groups)[layer.group];
  const py::handle T = find(group, names.T);
  // Another value is a bad option, which Python names.
  if (!PyLong_CheckExact(T.ptr()) || T.cast<int64_t>() < 1) {
    return optimizer.attr("factors_due")(layer.group).cast<bool>();
  }
  return singd::is_due(group);
}

void forget_statistics(const GatheredLayer& layer) {
  const Keys& keys = layer.keys;
  for (const auto* key : {&keys.statistic_K, &keys.statistic_C, &keys.rows, &keys.loss_terms}) {
    if (find(layer.state, *key)) PyDict_DelItem(layer.state.ptr(), key->ptr());
  }
}

// Notes the current backward pass. Where earlier passes have left no gradients, these were cleared
// (by `model.zero_grad()`, say), and their statistics go the same way.
void Gatherer::begin(GatheredLayer& layer, int64_t pass) {
  layer.last_pass = pass;
  layer.counted_terms = 0;
  layer.pass_counts = accumulates(layer.parameters);
  const bool is_clear = std::none_of(layer.parameters.begin(), layer.parameters.end(),
                                     [](const WeakTensor& parameter) {
                                       const at::Tensor tensor = parameter.get();
                                       return tensor.defined() && tensor.grad().defined();
                                     });
  if (layer.pass_counts && is_clear) forget_statistics(layer);
}

Shape Gatherer::add_linear(const GatheredLayer& layer, Sums sums, const at::Tensor& x,
                           const at::Tensor& g) const {
  static const std::string expand = "expand", mean = "mean", sum = "sum";
  const GroupOptions& options = options_[layer.group];
  const at::Tensor inputs = linear_rows(x), gradients = linear_rows(g);
  const py::gil_scoped_release no_gil;
  const at::AutoDispatchBelowADInplaceOrView guard;
  accumulate_->call(sums.statistic_C, gradients, sums.C, layer.dim_C, options.structure_C, false,
                    options.reduce ? sum : expand);
  accumulate_->call(sums.statistic_K, inputs, sums.K, layer.dim_K, options.structure_K,
                    layer.has_bias, options.reduce ? mean : expand);
  return {gradients.size(0), gradients.size(1)};
}

// Counts rows, and the terms that the loss averages over, so that micro-batches make one big batch.
// Uses of a layer within one backward pass see the same terms: they are counted once. A loss that
// is a sum has the factor 1, however many passes there are.
void Gatherer::count(GatheredLayer& layer, Shape shape) const {
  const GroupOptions& options = options_[layer.group];
  const auto [batch, shared] = shape;
  py::dict& state = layer.state;
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

void Gatherer::receive(GatheredLayer& layer, const at::Tensor& x, const at::Tensor& g, int64_t pass,
                       const py::object& hook) {
  if (paused) return;
  if (pass != pass_) {
    begin_pass_(optimizer_.get());
    pass_ = pass;
  }
  if (pass != layer.last_pass) begin(layer, pass);
  if (!layer.pass_counts) return;
  Sums sums(layer);
  if (layer.is_linear) return count(layer, add_linear(layer, std::move(sums), x, g));
  const auto [batch, shared] = hook.attr("add_rows")(x, g).cast<std::pair<int64_t, int64_t>>();
  count(layer, {batch, shared});
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
    const GatheredLayer& layer = gatherer->layer(layer_);
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
  m.def("is_due", &is_due, py::arg("group"));
  py::class_<Gatherer, std::shared_ptr<Gatherer>>(m, "Gatherer")
      .def(py::init<const py::object&, py::function>(), py::arg("optimizer"), py::arg("begin_pass"))
      .def_readwrite("paused", &Gatherer::paused)
      .def_readwrite("unsettled", &Gatherer::unsettled)
      .def("add", &Gatherer::add, py::arg("group"), py::arg("parameters"), py::arg("prefix"),
           py::arg("dim_K"), py::arg("dim_C"), py::arg("has_bias"), py::arg("is_linear"))
      .def(
          "set_options",
          [](Gatherer& self, int group, std::string structure_K, std::string structure_C,
             bool reduce, std::optional<std::string> loss_average) {
            self.set_options(group, {std::move(structure_K), std::move(structure_C), reduce,
                                     std::move(loss_average).value_or("")});
          },
          py::arg("group"), py::arg("structure_K"), py::arg("structure_C"), py::arg("reduce"),
          py::arg("loss_average"))
      .def("set_operators", &Gatherer::set_operators, py::arg("name"))
      .def("bind", &Gatherer::bind, py::arg("layer"), py::arg("state"))
      .def("unbind", &Gatherer::unbind);
  py::class_<LayerReceiver, std::shared_ptr<LayerReceiver>>(m, "LayerReceiver")
      .def(py::init<const std::shared_ptr<Gatherer>&, int, const py::object&, bool>(),
           py::arg("gatherer"), py::arg("layer"), py::arg("hook"), py::arg("input_is_first"))
      .def("watch", &LayerReceiver::watch, py::arg("args"), py::arg("kwargs"), py::arg("output"))
      .def("receive", &LayerReceiver::receive, py::arg("x"), py::arg("g"),
           py::arg("backward_pass"));
}

}  // namespace singd
