// Collects the layers of a preconditioned_update_ and launches what updates them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../call_checks.h"
#include "../structures/layout.h"
#include "preconditioned_update.h"

namespace singd::cuda {

// A side of a layer: its factor, or the identity if the factor is undefined.
struct StepSide {
  SideShape shape;
  at::Tensor factor;
};

class StepBatch {
 public:
  // `workspace` is grown as needed; the counters of `a` are the batch's own.
  StepBatch(at::Tensor& workspace, const StepArguments& a, Stream stream)
      : workspace_(workspace), arguments_(a), stream_(stream) {}

  // Layer `index` of the call. The gradients of the parts are what the sides act on.
  void add(int64_t index, const std::vector<Part>& parts, const at::Tensor& skipped,
           const StepSide& right, const StepSide& left);
  // Updates all layers added so far, in a number of launches that does not grow with theirs (as
  // long as they fit a kernel's arguments).
  void launch();

 private:
  // Layers that share their launches, and their factors, right and left by turns.
  struct Group {
    StepKind kind;
    bool tiled;
    std::vector<StepLayer> layers;
    std::vector<StepFactor> factors;
  };

  Group& group_of(const StepKind& kind, bool tiled);
  void launch(Group& group, size_t begin, int count);
  at::Tensor contiguous(const at::Tensor& tensor);

  at::Tensor& workspace_;
  StepArguments arguments_;
  Stream stream_;
  std::vector<Group> groups_;
  std::vector<at::Tensor> alive_;                               // until their kernels are launched
  std::vector<std::pair<at::Tensor, at::Tensor>> write_backs_;  // from contiguous copies
};

}  // namespace singd::cuda
