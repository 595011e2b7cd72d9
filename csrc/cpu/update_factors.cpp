// update_factors_: the Riemannian momenta and the Kronecker factors of a list of layers (Figure 4
// of the paper, right column). Per layer
//
//   H_K = Pi_K(K^T U K)    H_C = Pi_C(C^T G C)          from the statistics
//   m_K <- alpha1 m_K + s/2 (tr(H_C)/d_o H_K + lambda tr(C^T C)/d_o Pi_K(K^T K) - I)    and
//   m_C <- alpha1 m_C + s/2 (tr(H_K)/d_i H_C + lambda tr(K^T K)/d_i Pi_C(C^T C) - I)
//   K <- K Expm(-beta1 m_K)    C <- C Expm(-beta1 m_C)  truncated after order 1 or 2
//
// and a commit of all four only if all four are finite.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../call_checks.h"
#include "../structures/registry.h"
#include "../structures/spec.h"
#include "math.h"
#include "store.h"

namespace singd::cpu {
namespace {

constexpr const char* kOp = "update_factors_";

// What became of a layer: the codes of the returned tensor.
enum Outcome : int64_t { kCommitted = 0, kRejected = 1, kCapped = 2 };

struct Options {
  double lr_cov, damping, alpha1, step_cap;
  bool kfac_like, normalize_lr_cov;
  int64_t expm_order;
};

// One factor of one layer: its old state and what the other factor needs of it.
struct Factor {
  Layout layout;
  at::Tensor state;           // K in its own dtype
  at::Tensor momentum_state;  // m_K in its own dtype; undefined if alpha1 = 0
  at::Tensor k, h, gram;      // K, H_K and Pi(K^T K) in the statistic's dtype
  double mean_trace_h = 0, mean_trace_gram = 0;
};

struct Candidate {
  at::Tensor k, momentum;
  bool finite = false, capped = false;
};

Factor make_factor(const at::Tensor& state, const at::Tensor& momentum, const at::Tensor& statistic,
                   double scale, int64_t dim, const std::string& structure) {
  const auto dtype = statistic.scalar_type();
  Factor f;
  f.layout = make_layout(structure, dim);
  f.state = state;
  f.momentum_state = momentum;
  f.k = state.to(dtype);
  f.h = at::empty_like(statistic);
  f.gram = at::empty_like(statistic);
  dispatch_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    visit(f.layout, [&](const auto& family) {
      const T* k = f.k.template const_data_ptr<T>();
      T *h = f.h.template mutable_data_ptr<T>(), *gram = f.gram.template mutable_data_ptr<T>();
      family.template conjugate<AtenMath, T>(k, statistic.const_data_ptr<T>(), h);
      family.template gram<AtenMath, T>(k, gram);
      for (int64_t i = 0; i < family.size(); ++i) h[i] = static_cast<T>(h[i] * scale);
      f.mean_trace_h = static_cast<double>(family.trace(h)) / static_cast<double>(dim);
      f.mean_trace_gram = static_cast<double>(family.trace(gram)) / static_cast<double>(dim);
    });
  });
  return f;
}

// The new Riemannian momentum of `f`, whose partner is the layer's other factor.
template <class T, class FamilyT>
std::vector<T> new_momentum(const FamilyT& family, const Factor& f, const Factor& partner,
                            const Options& o) {
  const double h_scale = o.kfac_like ? 1.0 : partner.mean_trace_h;
  const double gram_scale = o.damping * (o.kfac_like ? 1.0 : partner.mean_trace_gram);
  const double s = 0.5 * (o.normalize_lr_cov ? 1.0 - o.alpha1 : 1.0);
  const T *h = f.h.const_data_ptr<T>(), *gram = f.gram.const_data_ptr<T>();
  std::vector<T> m(family.size());
  for (size_t i = 0; i < m.size(); ++i) {
    m[i] = static_cast<T>(s * (h_scale * h[i] + gram_scale * gram[i]));
  }
  family.add_to_diagonal(m.data(), static_cast<T>(-s));
  if (f.momentum_state.defined()) {
    const at::Tensor old = f.momentum_state.to(f.h.scalar_type());
    const T* previous = old.const_data_ptr<T>();
    for (size_t i = 0; i < m.size(); ++i) m[i] += static_cast<T>(o.alpha1 * previous[i]);
  }
  return m;
}

// beta1 for this momentum: normalised if asked for, and such that beta1 ||m|| <= step_cap.
template <class T, class FamilyT>
double step_size(const FamilyT& family, const std::vector<T>& m, const Options& o, bool& capped) {
  double beta = o.lr_cov;
  if (o.normalize_lr_cov) {
    double largest = 1.0;
    for (const T value : m) largest = std::max(largest, std::abs(static_cast<double>(value)));
    beta /= largest;
  }
  const double bound = family.norm_bound(m.data());
  capped = beta * bound > o.step_cap;
  return capped ? o.step_cap / bound : beta;
}

// Expm(-beta m) - I, truncated. Without the identity, whose rounding would be that of K itself.
template <class T, class FamilyT>
std::vector<T> truncated_exponential_minus_one(const FamilyT& family, std::vector<T> m, double beta,
                                               int64_t order) {
  for (T& value : m) value = static_cast<T>(-beta * value);
  if (order == 1) return m;
  std::vector<T> square(m.size());
  family.template product<AtenMath, T>(m.data(), m.data(), square.data());
  for (size_t i = 0; i < m.size(); ++i) m[i] += square[i] / 2;
  return m;
}

Candidate candidate(const Factor& f, const Factor& partner, const Options& o,
                    const RoundingKey& key) {
  Candidate result;
  dispatch_compute(f.h.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    visit(f.layout, [&](const auto& family) {
      const std::vector<T> m = new_momentum<T>(family, f, partner, o);
      const double beta = step_size(family, m, o, result.capped);
      const std::vector<T> e = truncated_exponential_minus_one(family, m, beta, o.expm_order);
      const T* old = f.k.template const_data_ptr<T>();
      std::vector<T> k(m.size());
      family.template product<AtenMath, T>(old, e.data(), k.data());
      for (size_t i = 0; i < k.size(); ++i) k[i] += old[i];
      bool k_finite = false, m_finite = false;
      std::tie(result.k, k_finite) = stored_like(f.state, k.data(), key.stream(0));
      std::tie(result.momentum, m_finite) = stored_like(
          f.momentum_state.defined() ? f.momentum_state : f.state, m.data(), key.stream(1));
      result.finite = k_finite && m_finite;
    });
  });
  return result;
}

// Keeps everything, bit for bit, unless both candidates are finite.
Outcome commit(const Factor& k, const Factor& c, const Candidate& new_k, const Candidate& new_c,
               const at::Tensor& rejected) {
  if (!new_k.finite || !new_c.finite) {
    rejected.add_(1);
    return kRejected;
  }
  for (const auto& [f, next] : {std::pair(&k, &new_k), std::pair(&c, &new_c)}) {
    f->state.copy_(next->k);
    if (f->momentum_state.defined()) f->momentum_state.copy_(next->momentum);
  }
  return new_k.capped || new_c.capped ? kCapped : kCommitted;
}

void update_factors_(at::TensorList K, at::TensorList C, at::TensorList m_K, at::TensorList m_C,
                     at::TensorList rejected, at::TensorList statistic_K,
                     at::TensorList statistic_C, at::ArrayRef<double> scale_K,
                     at::ArrayRef<double> scale_C, at::IntArrayRef dim_K, at::IntArrayRef dim_C,
                     const std::string& structure_K, const std::string& structure_C,
                     const at::Tensor& lr_cov, double damping, double alpha1, bool kfac_like,
                     bool normalize_lr_cov, int64_t expm_order, double step_cap,
                     at::Tensor& outcomes, at::Tensor& /*workspace*/,
                     const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf,
                     std::optional<at::IntArrayRef> rounding) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const FactorLists lists{K,       C,       m_K,   m_C,   rejected,    statistic_K, statistic_C,
                          scale_K, scale_C, dim_K, dim_C, structure_K, structure_C};
  const bool has_momenta = alpha1 != 0;
  check_factor_lists(kOp, lists, has_momenta, outcomes.device());
  check_outcomes(kOp, outcomes, K.size());
  check_factor_options(kOp, expm_order, step_cap);
  const Options options{checked_scalar(kOp, "lr_cov", lr_cov),
                        damping,
                        alpha1,
                        step_cap,
                        kfac_like,
                        normalize_lr_cov,
                        expm_order};
  const Scaler scaler = checked_scaler(kOp, grad_scale, found_inf);
  const RoundingKey key = checked_rounding_key(kOp, rounding);

  const auto momentum_of = [&](at::TensorList list, size_t i) {
    return has_momenta ? list[i] : at::Tensor();
  };
  outcomes.zero_();
  for (size_t i = 0; i < K.size() && !scaler.found_inf; ++i) {
    const Factor k =
        make_factor(K[i], momentum_of(m_K, i), statistic_K[i], scale_K[i], dim_K[i], structure_K);
    const Factor c =
        make_factor(C[i], momentum_of(m_C, i), statistic_C[i],
                    scale_C[i] * scaler.unscale * scaler.unscale, dim_C[i], structure_C);
    const RoundingKey layer_key = key.stream(i);
    const Candidate new_k = candidate(k, c, options, layer_key.stream(0));
    const Candidate new_c = candidate(c, k, options, layer_key.stream(1));
    outcomes.mutable_data_ptr<int64_t>()[i] = commit(k, c, new_k, new_c, rejected[i]);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(singd_ext, CPU, m) { m.impl("update_factors_", update_factors_); }

}  // namespace singd::cpu
