// update_factors_: checks, the list of factors, and the order of the stages (factor_update.h).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../call_checks.h"
#include "factor_update.h"
#include "runtime.h"
#include "wide_blocks.h"

namespace singd::cuda {
namespace {

constexpr const char* kOp = "update_factors_";
// Layers are updated together as long as their arrays fit in this many bytes.
constexpr int64_t kMaxListBytes = int64_t(256) << 20;
constexpr int64_t kAlignment = 256;

// One factor of one layer: the arguments of the operator for it.
struct Factor {
  at::Tensor state, momentum, statistic;  // momentum is undefined if alpha1 = 0
  double scale;
  Layout layout;

  bool copied() const { return state.scalar_type() != statistic.scalar_type(); }
  int64_t bytes() const {
    const int64_t arrays = (kFactorArrays + copied()) * array_stride(state.numel());
    const int64_t norms = norm_blocks(layout) * static_cast<int64_t>(sizeof(PartialNorms));
    return (arrays * statistic.element_size() + norms + kAlignment - 1) / kAlignment * kAlignment;
  }
};

// Factor 2 i is K of layer i, factor 2 i + 1 its C.
using Factors = std::vector<Factor>;

Factor make_factor(const at::Tensor& state, const at::Tensor& momentum, const at::Tensor& statistic,
                   double scale, int64_t dim, const std::string& structure) {
  TORCH_CHECK_VALUE(dim <= std::numeric_limits<int32_t>::max(), "singd_ext::", kOp,
                    ": a factor has dimension ", dim, ", which does not fit 32 bits");
  return {state, momentum, statistic, scale, checked_layout(kOp, structure, dim)};
}

FactorItem item_of(const Factor& f, size_t id, void* arrays) {
  FactorItem item = {};
  item.state = f.state.mutable_data_ptr();
  item.momentum = f.momentum.defined() ? f.momentum.mutable_data_ptr() : nullptr;
  item.statistic = f.statistic.const_data_ptr();
  item.arrays = arrays;
  item.scale = f.scale;
  item.size = f.state.numel();
  item.set_layout(f.layout);
  item.id = static_cast<uint16_t>(id);
  item.copied = f.copied();
  item.wide = is_wide(f.layout);
  item.state_dtype = static_cast<uint8_t>(dtype_of(f.state));
  item.momentum_dtype = static_cast<uint8_t>(dtype_of(f.momentum.defined() ? f.momentum : f.state));
  return item;
}

// The arrays of a wide factor as tensors, for library products.
struct WideFactor {
  Layout layout;
  at::Tensor v, h, g, k, statistic;

  WideFactor(const Factor& f, void* arrays) : layout(f.layout), statistic(f.statistic) {
    const int64_t size = f.state.numel();
    const auto array = [&](int64_t n) {
      char* const data = static_cast<char*>(arrays);
      return at::for_blob(data + n * array_stride(size) * f.statistic.element_size(), {size})
          .options(f.statistic.options())
          .target_device(f.statistic.device())
          .make_tensor();
    };
    v = array(0);
    h = array(1);
    g = array(2);
    k = f.copied() ? array(kFactorArrays) : f.state;
  }

  void curvature_and_gram() const {
    wide_product(layout, k, true, k, g);
    if (layout.family == Family::kDense) return;  // whose statistic is K^T U K
    wide_product(layout, statistic, false, k, v);
    wide_product(layout, k, true, v, h);
  }
  void square() const { wide_square(layout, v, g); }
  void change() const { wide_product(layout, k, false, g, v); }
};

void run_stages(const FactorList& list, const std::vector<WideFactor>& wide) {
  copy_factors(list);
  for (const WideFactor& f : wide) f.curvature_and_gram();
  first_products(list);
  curvature_and_gram(list);
  traces_of_factors(list);
  momenta_of_factors(list);
  norms_of_factors(list);
  step_sizes(list);
  first_order(list);
  if (list.options.second_order) {
    for (const WideFactor& f : wide) f.square();
    second_order(list);
  }
  for (const WideFactor& f : wide) f.change();
  factor_candidates(list);
  commit_factors(list);
}

// Updates the layers [begin, end) in one list of `bytes` for the factors' arrays.
void update_list(const Factors& factors, at::TensorList rejected, size_t begin, size_t end,
                 FactorOptions options, char* workspace, Stream stream) {
  FactorList list;
  list.stream = stream;
  options.results = reinterpret_cast<FactorResult*>(workspace);
  options.first_layer = static_cast<int64_t>(begin);
  list.options = options;
  char* arrays = workspace + 2 * kMaxLayers * sizeof(FactorResult);
  std::vector<WideFactor> wide;
  for (size_t i = 2 * begin; i < 2 * end; ++i) {
    const Factor& f = factors[i];
    auto& items = f.statistic.scalar_type() == at::kFloat ? list.single : list.twice;
    items.push_back(item_of(f, i - 2 * begin, arrays));
    if (items.back().wide) wide.emplace_back(f, arrays);
    arrays += f.bytes();
  }
  for (size_t i = begin; i < end; ++i) {
    list.rejected.push_back(rejected[i].mutable_data_ptr<int64_t>());
  }
  run_stages(list, wide);
}

// The ends of lists of layers that are updated together.
std::vector<size_t> split(const Factors& factors, int64_t& most_bytes) {
  std::vector<size_t> ends;
  int64_t bytes = 0;
  size_t begin = 0;
  most_bytes = 0;
  for (size_t i = 0; 2 * i < factors.size(); ++i) {
    const int64_t layer = factors[2 * i].bytes() + factors[2 * i + 1].bytes();
    if (i > begin && (bytes + layer > kMaxListBytes || i - begin == kMaxLayers)) {
      ends.push_back(i);
      begin = i;
      bytes = 0;
    }
    bytes += layer;
    most_bytes = std::max(most_bytes, bytes);
  }
  if (!factors.empty()) ends.push_back(factors.size() / 2);
  return ends;
}

void update_factors_(at::TensorList K, at::TensorList C, at::TensorList m_K, at::TensorList m_C,
                     at::TensorList rejected, at::TensorList statistic_K,
                     at::TensorList statistic_C, at::ArrayRef<double> scale_K,
                     at::ArrayRef<double> scale_C, at::IntArrayRef dim_K, at::IntArrayRef dim_C,
                     const std::string& structure_K, const std::string& structure_C,
                     const at::Tensor& lr_cov, double damping, double alpha1, bool kfac_like,
                     bool normalize_lr_cov, int64_t expm_order, double step_cap,
                     at::Tensor& outcomes, at::Tensor& workspace,
                     const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf,
                     std::optional<at::IntArrayRef> rounding) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Device device = outcomes.device();
  const c10::DeviceGuard device_guard(device);
  const FactorLists lists{K,       C,       m_K,   m_C,   rejected,    statistic_K, statistic_C,
                          scale_K, scale_C, dim_K, dim_C, structure_K, structure_C};
  const bool has_momenta = alpha1 != 0;
  check_factor_lists(kOp, lists, has_momenta, device);
  check_outcomes(kOp, outcomes, K.size());
  check_factor_options(kOp, expm_order, step_cap);
  check_on_device(kOp, "workspace", workspace, device);
  FactorOptions options = {};
  options.lr_cov = scalar_argument(kOp, "lr_cov", lr_cov, device);
  options.grad_scale = scalar_argument(kOp, "grad_scale", grad_scale, device, 1.0);
  options.found_inf = scalar_argument(kOp, "found_inf", found_inf, device, 0.0);
  options.damping = damping;
  options.alpha1 = alpha1;
  options.step_cap = step_cap;
  options.kfac_like = kfac_like;
  options.normalize_lr_cov = normalize_lr_cov;
  options.second_order = expm_order == 2;
  options.rounding = checked_rounding_key(kOp, rounding);
  options.outcomes = outcomes.mutable_data_ptr<int64_t>();

  Factors factors;
  for (size_t i = 0; i < K.size(); ++i) {
    factors.push_back(make_factor(K[i], has_momenta ? m_K[i] : at::Tensor(), statistic_K[i],
                                  scale_K[i], dim_K[i], structure_K));
    factors.push_back(make_factor(C[i], has_momenta ? m_C[i] : at::Tensor(), statistic_C[i],
                                  scale_C[i], dim_C[i], structure_C));
  }
  int64_t bytes = 0;
  const std::vector<size_t> ends = split(factors, bytes);
  bytes += 2 * kMaxLayers * static_cast<int64_t>(sizeof(FactorResult)) + kAlignment;
  uintptr_t memory = reinterpret_cast<uintptr_t>(workspace_of(workspace, bytes));
  memory = (memory + kAlignment - 1) / kAlignment * kAlignment;
  size_t begin = 0;
  for (const size_t end : ends) {
    run(kOp, structure_K + "', '" + structure_C, K[begin].sizes(), [&] {
      update_list(factors, rejected, begin, end, options, reinterpret_cast<char*>(memory),
                  current_stream(outcomes));
    });
    begin = end;
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(SINGD_LIBRARY, SINGD_CUDA_KEY, m) { m.impl("update_factors_", update_factors_); }

}  // namespace singd::cuda
