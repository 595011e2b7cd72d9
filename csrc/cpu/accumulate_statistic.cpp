// accumulate_statistic_: adds the rows of one micro-batch to the statistic of one factor.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../call_checks.h"
#include "../structures/registry.h"
#include "bfloat16_statistic.h"
#include "math.h"
#include "rows.h"
#include "statistics.h"

namespace singd::cpu {
namespace {

void accumulate_statistic_(at::Tensor& statistic, const at::Tensor& rows, const at::Tensor& factor,
                           int64_t dim, const std::string& structure, bool ones_column,
                           const std::string& shared, bool overwrite) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "accumulate_statistic_";
  const Layout layout = checked_statistic(op, statistic, rows, factor, dim, structure, ones_column);
  const auto dtype = statistic.scalar_type();
  const Shared treatment = checked_shared(op, shared);
  if (overwrite && !layout.is_local()) statistic.zero_();
  if (Bfloat16Statistic::takes(rows, factor, layout, treatment)) {
    return Bfloat16Statistic(layout, statistic.mutable_data_ptr<float>()).add(rows, factor);
  }
  const RowsView view = rows_view(rows, treatment);
  // The others keep what K does to U for later.
  const bool needs_factor = !layout.is_local() || layout.transposed;
  const at::Tensor k = needs_factor ? factor.to(dtype) : factor;
  dispatch_compute(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* storage = needs_factor ? k.const_data_ptr<T>() : nullptr;
    T* sums = statistic.mutable_data_ptr<T>();
    if (layout.is_local()) {
      return LocalStatistic<T>(view, layout, storage, sums, overwrite).add();
    }
    visit_whole(layout, [&](const auto& family) {
      for_each_chunk<T>(rows, view, layout, [&](const T* chunk, int64_t m) {
        family.template accumulate<AtenMath, T>(storage, chunk, m, sums);
      });
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(singd_ext, CPU, m) { m.impl("accumulate_statistic_", accumulate_statistic_); }

}  // namespace singd::cpu
