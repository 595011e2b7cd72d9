// The step of many layers at once with the vectorised kernels: what every thread does, and when.
//
//   prepare   P = F F^T of all factors, unless it is kept from an earlier step
//   read      the largest gradient of a layer, and with a border on the left its thin products
//   write     momentum and weight, unless the preconditioned gradient is not finite
//
// Layers are read and written in groups that stay in a cache from the one to the other; a group is
// written in the same round as the next one is read. P is prepared of all layers first where it is
// kept for later steps, else of a group a round before that is read. Between rounds no thread waits
// for all others: what a task needs of the round before it is counted.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "layer_groups.h"
#include "local_product.h"
#include "panels.h"
#include "product_forms.h"
#include "rounds.h"
#include "shares.h"

namespace singd::cpu {

template <class T>
class LocalStep {
 public:
  // products: P of all factors, of the size that they take only if it holds them already; null if
  // they are not to be kept.
  LocalStep(at::Tensor& workspace, at::Tensor* products)
      : workspace_(workspace), products_(products) {}

  // For so many layers.
  void reserve(size_t layers) {
    layers_.reserve(layers);
    factors_.reserve(2 * layers);
  }

  // Adds a layer and its factors C and K; without them its gradient is taken as it is.
  void add(StepLayer<T> layer, const LocalFactor& left = {}, const LocalFactor& right = {}) {
    for (const auto& [product, factor] :
         {std::pair(&layer.left, &left), std::pair(&layer.right, &right)}) {
      product->kind = factor->kind;
      product->layout = factor->layout;
      factors_.push_back(*factor);
    }
    // Where all is diagonal, columns may have any order, and so the one of memory.
    if (is_pointwise(layer) && layer.parts[0].apart == 0) {
      std::swap(layer.right.taps, layer.parts[0].taps);
    }
    choose_forms(layer, right, tiles_ != nullptr, pairs_);
    layers_.push_back(layer);
  }

  // updated(index, whether the layer was updated) for every layer, in their order.
  template <class Function>
  void run(Function updated) {
    if (layers_.empty()) return;
    const bool stream = streams();
    for (size_t i = 0; i < layers_.size(); ++i) {
      layers_[i].options.stream = stream;
      layers_[i].options.ask = asking_pays();
      plan_writes(i);
      plan_reads(i);
    }
    first_read_.push_back(read_tasks_.size());
    first_write_.push_back(write_tasks_.size());
    groups_.plan(layers_.size(), [&](size_t begin, size_t end) { return elements(begin, end); });
    try {
      const bool kept = fit_products();
      Arena::run(workspace_, [&](Arena& arena) { allocate(arena); });
      if (products_ != nullptr) prepare_all(kept);
    } catch (...) {
      if (products_ != nullptr) products_->resize_({0});  // they do not hold what their size says
      throw;
    }
    writes_.assign(layers_.size(), 1);
    unread_ = std::vector<std::atomic<size_t>>(layers_.size());
    for (size_t i = 0; i < layers_.size(); ++i) unread_[i] = first_read_[i + 1] - first_read_[i];
    run_rounds();
    for (size_t i = 0; i < layers_.size(); ++i) updated(i, static_cast<bool>(writes_[i]));
  }

 private:
  struct Read {
    Panel panel;
    double largest = 0;
    T* products = nullptr;  // of a border on the left
  };

  // Bytes of all weights that are stored past the caches where several threads have read each of
  // them: more than a cache of one thread holds, since smaller ones stay there, and less than the
  // last cache, since of larger ones no cache has copies that must be told.
  static constexpr int64_t kLeastStreamed = int64_t{1} << 20, kMostStreamed = int64_t{1} << 25;
  // Elements below which a further thread costs more than it saves.
  static constexpr int64_t kGrain = 16384;

  static const StepKernels<T>& step_kernels() {
    if constexpr (std::is_same_v<T, float>) {
      if (bfloat16_step() != nullptr) return *bfloat16_step();
    }
    return kernels().step<T>();
  }

  static const StepKernels<T>* tile_kernels() {
    if constexpr (std::is_same_v<T, float>) return tile_step();
    return nullptr;
  }

  static bool is_pointwise(const StepLayer<T>& layer) {
    return layer.left.is_pointwise() && layer.right.is_pointwise();
  }

  const StepKernels<T>& kernels_of(const StepLayer<T>& layer) const {
    return layer.left.has_planes() ? *tiles_ : kernels_;
  }

  bool streams() const {
    if (asking_pays()) return false;  // what was asked for is written faster where it is
    int64_t bytes = 0;
    for (const StepLayer<T>& layer : layers_) {
      bytes += layer.rows * layer.columns * size_of(layer.parts[0].weight.type);
    }
    return at::get_num_threads() > 1 && bytes >= kLeastStreamed && bytes <= kMostStreamed;
  }

  void plan_writes(size_t index) {
    const StepLayer<T>& layer = layers_[index];
    const auto [height, width] = Panels<T>::to_write(layer, is_pointwise(layer));
    first_write_.push_back(write_tasks_.size());
    for (int64_t i = 0; i < layer.rows; i += height) {
      for (int64_t j = 0; j < layer.columns; j += width) {
        const Panel panel{i, std::min(i + height, layer.rows), j,
                          std::min(j + width, layer.columns)};
        write_tasks_.push_back(panel);
        scratch_ = std::max(scratch_, step_scratch(layer, panel));
      }
    }
  }

  void plan_reads(size_t index) {
    const StepLayer<T>& layer = layers_[index];
    const int64_t height = Panels<T>::rows_to_read(layer);
    if (layer.left.has_border()) scratch_ = std::max(scratch_, kThinRows * spaced(kThinColumns));
    first_read_.push_back(read_tasks_.size());
    for (int64_t i = 0; i < layer.rows; i += height) {
      read_tasks_.push_back({{i, std::min(i + height, layer.rows), 0, layer.columns}});
    }
  }

  LocalProduct<T>& product(size_t factor) {
    StepLayer<T>& layer = layers_[factor / 2];
    return factor % 2 == 0 ? layer.left : layer.right;
  }

  // Memory of the products that are kept; whether they are there, and made for the order in which
  // layers lie in memory now.
  bool fit_products() {
    if (products_ == nullptr) return false;
    int64_t* orders = nullptr;
    bool kept = Arena::fit(*products_, [&](Arena& arena) {
      norms_ = arena.take<double>(factors_.size());
      orders = arena.take<int64_t>(layers_.size());
      for (size_t i = 0; i < factors_.size(); ++i) allocate_product(product(i), arena);
    });
    for (size_t i = 0; i < layers_.size(); ++i) {
      const int64_t order = layers_[i].is_turned ? -1 : layers_[i].right.taps;
      kept = kept && orders[i] == order;
      orders[i] = order;
    }
    return kept;
  }

  void allocate(Arena& arena) {
    for (size_t i = 0; i < layers_.size(); ++i) {
      StepLayer<T>& layer = layers_[i];
      for (const int side : {0, 1}) {
        const LocalProduct<T>& product = side == 0 ? layer.left : layer.right;
        const int64_t side_of_square = product.stride_of(product.width());
        const int64_t square = side_of_square * side_of_square;
        const int64_t row = product.has_border() ? product.wide_stride() : 0;
        scratch_ = std::max(scratch_, factors_[2 * i + side].size + std::max(square, row));
      }
    }
    scratch_ = (scratch_ + 63) / 64 * 64;
    memory_ = arena.take<T>(scratch_ * at::get_num_threads());
    // What is read of a group is needed until it is written, and P while it is read before that.
    groups_.take_turns<2>(arena, [&](const LayerGroup& g, Arena& own) { allocate_reads(g, own); });
    if (products_ != nullptr) return;
    groups_.take_turns<3>(arena, [&](const LayerGroup& g, Arena& own) {
      for (size_t i = 2 * g.begin; i < 2 * g.end; ++i) allocate_product(product(i), own);
    });
  }

  void allocate_reads(const LayerGroup& group, Arena& arena) {
    for (size_t i = group.begin; i < group.end; ++i) {
      StepLayer<T>& layer = layers_[i];
      if (!layer.left.has_border()) continue;
      const int64_t b = layer.left.border();
      const int64_t rows = std::max(b + layer.left.overshoot(), layer.left.rows_of(b));
      const int64_t size = rows * spaced(layer.columns);
      for (size_t task = first_read_[i]; task < first_read_[i + 1]; ++task) {
        read_tasks_[task].products = arena.take<T>(size);
      }
      layer.border_products = read_tasks_[first_read_[i]].products;
      layer.border_rows = arena.take<T>(size);
    }
  }

  T* scratch(size_t thread) const { return memory_ + static_cast<int64_t>(thread) * scratch_; }

  // Threads for so much work.
  static size_t threads(int64_t elements) {
    return std::min(static_cast<size_t>(at::get_num_threads()),
                    static_cast<size_t>(elements / kGrain) + 1);
  }

  void prepare(size_t factor, size_t thread) {
    LocalProduct<T>& p = product(factor);
    if (p.kind == LocalKind::kIdentity) return;
    const LocalFactor& of = factors_[factor];
    kernels_of(layers_[factor / 2]).prepare(p, of.storage, of.size, scratch(thread));
  }

  // Products that are kept, which `are_there` from an earlier step or not.
  void prepare_all(bool are_there) {
    if (!are_there) {
      int64_t numbers = 0;
      for (const LocalFactor& factor : factors_) numbers += factor.size;
      Shares<size_t> factors;
      factors.begin(threads(numbers), factors_.size());
      factors.add(0, factors_.size(), 0, [](size_t i) { return i; });
      factors.run([&](size_t i, size_t thread) {
        prepare(i, thread);
        norms_[i] = product(i).norm;
      });
    }
    for (size_t i = 0; i < factors_.size(); ++i) product(i).norm = norms_[i];
  }

  int64_t elements(size_t begin, size_t end) const {
    int64_t sum = 0;
    for (size_t i = begin; i < end; ++i) sum += layers_[i].rows * layers_[i].columns;
    return sum;
  }

  // Round r writes group r - 2. Threads take their share of every layer: the rows that torch's
  // products gave them, so that gradients are where these wrote them. What takes longest comes
  // first.
  void run_rounds() {
    rounds_ = std::vector<Round>(static_cast<size_t>(groups_.count()) + 2);
    size_t most = 1;
    for (size_t r = 0; r < rounds_.size(); ++r) most = std::max(most, threads(work_of_round(r)));
    for (size_t r = 0; r < rounds_.size(); ++r) plan_round(r, most);
    in_threads(most, [&](size_t thread) {
      for (size_t r = 0; r < rounds_.size(); ++r) {
        rounds_[r].work(
            thread, [&](const Round::Task& task) { perform(task, r, thread); },
            [&](const Round::Task& task, size_t count) {
              if (task.phase == kRead) count_read(task.layer, count, thread);
            });
      }
    });
  }

  // The groups that a round writes, reads and prepares.
  std::array<LayerGroup, 3> groups_of(size_t round) const {
    const auto r = static_cast<int64_t>(round);
    const bool kept = products_ != nullptr;
    return {groups_.at(r - 2), groups_.at(r - 1), kept ? LayerGroup{} : groups_.at(r)};
  }

  int64_t work_of_round(size_t round) const {
    const auto [writes, reads, prepares] = groups_of(round);
    int64_t work = elements(writes.begin, writes.end) + elements(reads.begin, reads.end);
    for (size_t i = 2 * prepares.begin; i < 2 * prepares.end; ++i) work += factors_[i].size;
    return work;
  }

  void plan_round(size_t round, size_t threads) {
    const auto [writes, reads, prepares] = groups_of(round);
    const size_t tasks = 2 * (prepares.end - prepares.begin) +
                         (first_write_[writes.end] - first_write_[writes.begin]) +
                         (first_read_[reads.end] - first_read_[reads.begin]);
    Round& r = rounds_[round];
    r.begin(threads, tasks);
    for (size_t i = prepares.begin; i < prepares.end; ++i) r.add(kPrepare, i, 2 * i, 2 * i + 2);
    for (size_t i = writes.begin; i < writes.end; ++i) {
      r.add(kWrite, i, first_write_[i], first_write_[i + 1]);
    }
    for (size_t i = reads.begin; i < reads.end; ++i) {
      r.add(kRead, i, first_read_[i], first_read_[i + 1]);
    }
  }

  // A task may begin when those of the round before are done that make what it takes, or take what
  // lies where it makes something: layers of a round have the memory of those before (allocate).
  void perform(const Round::Task& task, size_t round, size_t thread) {
    const auto wait_for = [&](Phase phase) {
      if (round > 0) rounds_[round - 1].wait_for(phase);
    };
    switch (task.phase) {
      case kPrepare:
        wait_for(kWrite);
        return prepare(task.index, thread);
      case kRead:
        wait_for(kPrepare);
        wait_for(kWrite);
        return read(task.layer, read_tasks_[task.index], thread);
      case kWrite:
        wait_for(kRead);
        return write(task.layer, write_tasks_[task.index], thread);
    }
  }

  void read(size_t index, Read& task, size_t thread) {
    const StepLayer<T>& layer = layers_[index];
    task.largest = layer.left.has_border()
                       ? kernels_of(layer).thin(layer, task.panel, task.products, scratch(thread))
                       : kernels_.largest(layer, task.panel);
  }

  // So many tasks of a layer have been read.
  void count_read(size_t index, size_t count, size_t thread) {
    if ((unread_[index] -= count) == 0) writes_[index] = finish_read(index, thread);
  }

  void write(size_t index, const Panel& panel, size_t thread) const {
    const StepLayer<T>& layer = layers_[index];
    if (writes_[index]) kernels_of(layer).step(layer, panel, false, scratch(thread));
  }

  // Adds up what the tasks of a layer read, in their order; whether it is finite. The thread that
  // read last does it, while others go on.
  bool finish_read(size_t index, size_t thread) {
    const StepLayer<T>& layer = layers_[index];
    for (size_t i = first_read_[index] + 1; i < first_read_[index + 1]; ++i) {
      if (layer.left.has_border()) kernels_.add_products(layer, read_tasks_[i].products);
    }
    if (layer.left.has_border()) kernels_of(layer).finish_border(layer);
    return is_finite(index, thread);
  }

  // A bound tells, but near overflow, where what would be stored is looked at. Float16 is always
  // near it.
  bool is_finite(size_t index, size_t thread) const {
    const StepLayer<T>& layer = layers_[index];
    double largest = 0;
    for (size_t i = first_read_[index]; i < first_read_[index + 1]; ++i) {
      largest = std::max(largest, read_tasks_[i].largest);
    }
    const double limit = static_cast<double>(std::numeric_limits<T>::max()) / 2;
    if (!has_float16(layer) && largest <= limit && largest * layer.left.norm <= limit &&
        largest * layer.left.norm * layer.right.norm <= limit) {
      return true;
    }
    bool finite = true;
    for (size_t i = first_write_[index]; finite && i < first_write_[index + 1]; ++i) {
      finite = kernels_of(layer).step(layer, write_tasks_[i], true, scratch(thread));
    }
    return finite;
  }

  at::Tensor& workspace_;
  at::Tensor* products_;
  const StepKernels<T>& kernels_ = step_kernels();
  const StepKernels<T>* tiles_ = tile_kernels();
  const bool pairs_ = std::is_same_v<T, float> && pairs_are_faster();
  std::vector<StepLayer<T>> layers_;
  std::vector<LocalFactor> factors_;
  std::vector<Read> read_tasks_;
  std::vector<Panel> write_tasks_;
  std::vector<size_t> first_read_, first_write_;  // of every layer, and one past the last
  LayerGroups groups_;
  std::vector<Round> rounds_;
  std::vector<char> writes_;                 // whether a layer is to be written
  std::vector<std::atomic<size_t>> unread_;  // tasks of each layer that are left to be read
  int64_t scratch_ = 0;                      // of one thread
  T* memory_ = nullptr;
  double* norms_ = nullptr;  // of the products that are kept
};

}  // namespace singd::cpu
