// project, project_gram, extract, to_dense: between dense matrices and structured storage.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "../call_checks.h"
#include "../structures/registry.h"
#include "math.h"
#include "rows.h"
#include "statistics.h"

namespace singd::cpu {
namespace {

// The storage that fill(family, matrix, storage) makes of a square matrix, in the matrix's dtype.
template <class Fill>
at::Tensor from_dense(const char* op, const char* name, const at::Tensor& matrix,
                      const std::string& structure, Fill fill) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Layout layout = checked_square(op, name, matrix, structure);
  const auto dtype = compute_type(matrix.scalar_type());
  const at::Tensor source = matrix.to(dtype).contiguous();
  at::Tensor out = at::zeros({storage_size(layout)}, source.options());
  dispatch_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    visit(layout, [&](const auto& family) {
      fill(family, source.const_data_ptr<T>(), out.mutable_data_ptr<T>());
    });
  });
  return out.to(matrix.scalar_type());
}

at::Tensor project(const at::Tensor& symmetric, const std::string& structure) {
  return from_dense(
      "project", "symmetric", symmetric, structure,
      [](const auto& family, const auto* from, auto* to) { family.project(from, to); });
}

at::Tensor extract(const at::Tensor& dense, const std::string& structure) {
  return from_dense("extract", "dense", dense, structure,
                    [](const auto& family, const auto* from, auto* to) {
                      family.for_each_entry([&](int64_t slot, int64_t i, int64_t j, int) {
                        to[slot] = from[i * family.layout.dim + j];
                      });
                    });
}

at::Tensor project_gram(const at::Tensor& rows, const std::string& structure) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "project_gram";
  const Layout layout = checked_rows(op, rows, structure);
  const auto options = rows.options().dtype(compute_type(rows.scalar_type()));
  at::Tensor statistic = at::zeros({storage_size(layout)}, options);
  at::Tensor identity = at::zeros_like(statistic), out = at::zeros_like(statistic);
  const at::Tensor batch = rows.unsqueeze(0);
  const RowsView view = rows_view(batch, Shared::kExpand);
  dispatch_compute(compute_type(rows.scalar_type()), [&](auto zero) {
    using T = decltype(zero);
    T* sums = statistic.mutable_data_ptr<T>();
    if (layout.is_local()) {
      LocalStatistic<T>(view, layout, nullptr, sums).add();
    } else {
      visit_whole(layout, [&](const auto& family) {
        for_each_chunk<T>(batch, view, layout, [&](const T* chunk, int64_t m) {
          family.template accumulate<AtenMath, T>(nullptr, chunk, m, sums);
        });
      });
    }
    visit(layout, [&](const auto& family) {
      T* eye = identity.mutable_data_ptr<T>();
      family.add_to_diagonal(eye, T(1));
      family.template conjugate<AtenMath, T>(eye, sums, out.mutable_data_ptr<T>());
    });
  });
  return out;
}

at::Tensor to_dense(const at::Tensor& factor, int64_t dim, const std::string& structure) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Layout layout = checked_layout("to_dense", structure, dim);
  check_factor("to_dense", "factor", factor, structure, layout);
  const auto dtype = compute_type(factor.scalar_type());
  const at::Tensor source = factor.to(dtype);
  at::Tensor out = at::zeros({dim, dim}, source.options());
  dispatch_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = source.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    visit(layout, [&](const auto& family) {
      family.for_each_entry(
          [&](int64_t slot, int64_t i, int64_t j, int) { to[i * dim + j] = from[slot]; });
    });
  });
  return out.to(factor.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(singd_ext, CPU, m) {
  m.impl("project", project);
  m.impl("project_gram", project_gram);
  m.impl("extract", extract);
  m.impl("to_dense", to_dense);
}

}  // namespace singd::cpu
