// Every module call and every backward pass of a layer comes by here, between matrix products that
// leave nothing of Python's in the caches: in Python, each of these lines took microseconds.
#include "observation.h"

#include <ATen/TensorUtils.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace singd {
namespace {

// A tensor that is kept for the backward pass as autograd would keep it: with saved-tensor hooks,
// non-reentrant checkpointing keeps nothing and computes the tensor again, and save_on_cpu keeps it
// in host memory. Without them no version is checked: a call whose input is not multiplied, such as
// that of a layer whose bias alone is trained, may be followed by a change of it in place.
class Kept {
 public:
  explicit Kept(const at::Tensor& tensor) {
    if (torch::autograd::Engine::get_default_engine().get_default_saved_variable_hooks()) {
      packed_ = torch::autograd::SavedVariable(tensor, /*is_output=*/false);
    } else {
      tensor_ = tensor;
    }
  }
  at::Tensor tensor() const { return packed_.has_value() ? packed_->unpack() : tensor_; }
  void release() {
    tensor_.reset();
    packed_.reset();
  }

 private:
  at::Tensor tensor_;
  std::optional<torch::autograd::SavedVariable> packed_;
};

// What waits at an output for its gradient.
struct Delivery {
  std::shared_ptr<Receiver> receiver;
  Kept input;
  std::vector<int64_t> shape;  // of the output
  int outer_pass;              // that runs a segment of a reentrant checkpoint again, or -1

  void deliver(const at::Tensor& gradient) {
    if (gradient.defined()) {  // a function of the user's may have none for this output
      const py::gil_scoped_acquire gil;
      const at::NoGradGuard no_grad;
      const int pass = torch::autograd::get_current_graph_task_id();
      receiver->receive(input.tensor(), gradient.reshape(shape),
                        outer_pass == -1 ? pass : outer_pass);
    }
    // As autograd does, even if the user goes on holding the loss.
    if (!torch::autograd::get_current_graph_task_keep_graph()) input.release();
  }
};

// Whether a view is its base in another shape, so that its gradient is the base's in that shape.
bool is_reshaped(const at::Tensor& view, const at::Tensor& base) {
  if (view.numel() != base.numel() || view.storage_offset() != base.storage_offset()) return false;
  const auto strides = at::detail::computeStride(base.sizes(), base.strides(), view.sizes());
  if (!strides.has_value()) return false;
  for (int64_t i = 0; i < view.dim(); ++i) {
    if (view.size(i) > 1 && view.stride(i) != (*strides)[static_cast<size_t>(i)]) return false;
  }
  return true;
}

// Where the gradient of an output comes by, whatever becomes of the output in place. A view that is
// changed is made anew from the tensor that it is a view of, and its own hooks are passed by: such
// as the output of a Linear with more than two dimensions. The other tensor has the same numbers in
// the same order, unless the layer made another view, or one of what it was given.
at::Tensor observed(const at::Tensor& output, const at::Tensor& x) {
  if (!output.is_view()) return output;
  const at::Tensor base(output._base());
  const bool same = is_reshaped(output, base) && base.requires_grad() && !base.is_alias_of(x);
  return same ? base : output;
}

// A receiver that is a Python object.
class PythonReceiver : public Receiver {
 public:
  explicit PythonReceiver(const py::object& object) : object_(object) {}
  void receive(const at::Tensor& x, const at::Tensor& g, int64_t backward_pass) override {
    const py::object target = object_.get();
    if (!target.is_none()) target.attr("receive")(x, g, backward_pass);
  }

 private:
  WeakReference object_;
};

}  // namespace

void observe(const at::Tensor& output, const at::Tensor& x, std::shared_ptr<Receiver> receiver,
             bool active) {
  Kept input(x.variable_data());  // detached, past the dispatcher
  if (!active) return;
  const auto delivery = std::make_shared<Delivery>(
      Delivery{std::move(receiver), std::move(input), output.sizes().vec(),
               static_cast<int>(torch::autograd::get_current_graph_task_id())});
  observed(output, x).register_hook(
      [delivery](const at::Tensor& gradient) { delivery->deliver(gradient); });
}

bool accumulates(const std::vector<WeakTensor>& parameters) {
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  const auto* chosen = torch::autograd::get_current_graph_task_exec_info();
  if (nodes == nullptr || chosen == nullptr) return false;  // no backward pass is running
  for (const WeakTensor& item : parameters) {
    const at::Tensor parameter = item.get();
    if (!parameter.defined() || !parameter.requires_grad()) continue;
    const auto accumulator = torch::autograd::impl::grad_accumulator(parameter);
    if (!accumulator || nodes->count(accumulator.get()) == 0) continue;
    if (chosen->empty()) return true;  // backward() of everything
    const auto choice = chosen->find(accumulator.get());
    // autograd.grad captures the gradient of a leaf instead.
    if (choice != chosen->end() && choice->second.needed_ && !choice->second.captures_) return true;
  }
  return false;
}

void define_observation(py::module_& m) {
  m.def(
      "observe",
      [](const at::Tensor& output, const at::Tensor& x, const py::object& receiver, bool active) {
        observe(output, x, std::make_shared<PythonReceiver>(receiver), active);
      },
      py::arg("output"), py::arg("x"), py::arg("receiver"), py::arg("active"));
}

}  // namespace singd
