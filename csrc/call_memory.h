// What the calls of both operators for one parameter group keep from step to step, so that a steady
// step allocates nothing. None of it is state: it can be recomputed, and is not saved.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "python_references.h"

namespace singd {

// Tells whether factors are the ones of the last call, and unchanged since.
class KnownFactors {
 public:
  // Compares K and C with those of the last call, and knows these from now on.
  bool are(at::TensorList K, at::TensorList C = {}) {
    std::vector<Known> now;
    now.reserve(K.size() + C.size());
    for (const at::TensorList factors : {K, C}) {
      for (const at::Tensor& factor : factors) {
        now.push_back({WeakTensor(factor), static_cast<uint32_t>(factor._version())});
      }
    }
    const bool same = std::equal(now.begin(), now.end(), known_.begin(), known_.end());
    known_ = std::move(now);
    return same;
  }

 private:
  struct Known {
    WeakTensor factor;
    uint32_t version;

    bool operator==(const Known& other) const {
      return version == other.version && factor.get().is_same(other.factor.get());
    }
  };

  std::vector<Known> known_;
};

// Memory of a call, which begins with none.
class KeptTensor {
 public:
  explicit KeptTensor(at::ScalarType dtype) : dtype_(dtype) {}

  // Where the call runs; operators enlarge it in place.
  at::Tensor& on(const at::Device& device) {
    if (!tensor_.defined() || tensor_.device() != device) make(0, device);
    return tensor_;
  }
  const at::Tensor& tensor() const { return tensor_; }
  // Of so many numbers.
  at::Tensor& of(int64_t count, const at::Device& device) {
    if (on(device).numel() != count) make(count, device);
    return tensor_;
  }

 private:
  void make(int64_t count, const at::Device& device) {
    tensor_ = at::empty({count}, at::TensorOptions(dtype_).device(device));
  }

  at::ScalarType dtype_;
  at::Tensor tensor_;
};

// A number as a tensor on the CPU, which a call reads before it returns.
class KeptNumber {
 public:
  const at::Tensor& set(double number) {
    *tensor_.of(1, c10::kCPU).mutable_data_ptr<double>() = number;
    return tensor_.tensor();
  }

 private:
  KeptTensor tensor_{at::kDouble};
};

struct CallMemory {
  KeptTensor workspace{at::kByte};  // of both: they follow one another
  KeptNumber lr, lr_cov;
  KeptTensor factor_outcomes{at::kLong}, parameter_outcomes{at::kLong};

  // Where the CPU keeps K K^T and C C^T of sparse factors from one step to the next: empty, if K
  // and C are not those of the last call, or were updated.
  at::Tensor& products_of(at::TensorList K, at::TensorList C, const at::Device& device) {
    at::Tensor& products = products_.on(device);
    if (!factors_.are(K, C)) products.resize_(0);
    return products;
  }

  // What there is by now, workspace and products first, to be looked at.
  std::vector<at::Tensor> tensors() const {
    return {workspace.tensor(), products_.tensor(), factor_outcomes.tensor(),
            parameter_outcomes.tensor()};
  }

 private:
  KeptTensor products_{at::kByte};
  KnownFactors factors_;
};

}  // namespace singd
