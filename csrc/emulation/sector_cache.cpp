#include "sector_cache.h"

#include <algorithm>
#include <utility>

namespace singd::emulation {

namespace {

constexpr uint32_t kWhole = 0xFFFFFFFFu;

size_t power_of_two(size_t at_least) {
  size_t n = 1;
  while (n < at_least) n *= 2;
  return n;
}

}  // namespace

SectorCache::SectorCache(int64_t bytes, std::function<void(int owner, bool write)> on_dram)
    : capacity_(static_cast<size_t>(std::max<int64_t>(bytes / kSectorBytes, 1))),
      on_dram_(std::move(on_dram)),
      buckets_(power_of_two(2 * capacity_), -1) {}

size_t SectorCache::bucket_of(uint64_t sector) const {
  return static_cast<size_t>(sector * 0x9E3779B97F4A7C15u >> 20) & (buckets_.size() - 1);
}

int SectorCache::find(uint64_t sector) const {
  int node = buckets_[bucket_of(sector)];
  while (node >= 0 && nodes_[static_cast<size_t>(node)].sector != sector) {
    node = nodes_[static_cast<size_t>(node)].chain;
  }
  return node;
}

void SectorCache::link_newest(int index) {
  Node& node = nodes_[static_cast<size_t>(index)];
  node.newer = -1;
  node.older = newest_;
  if (newest_ >= 0) nodes_[static_cast<size_t>(newest_)].newer = index;
  newest_ = index;
  if (oldest_ < 0) oldest_ = index;
}

void SectorCache::unlink(int index) {
  const Node& node = nodes_[static_cast<size_t>(index)];
  (node.newer < 0 ? newest_ : nodes_[static_cast<size_t>(node.newer)].older) = node.older;
  (node.older < 0 ? oldest_ : nodes_[static_cast<size_t>(node.older)].newer) = node.newer;
}

void SectorCache::remove_from_bucket(int index) {
  int* link = &buckets_[bucket_of(nodes_[static_cast<size_t>(index)].sector)];
  while (*link != index) link = &nodes_[static_cast<size_t>(*link)].chain;
  *link = nodes_[static_cast<size_t>(index)].chain;
}

void SectorCache::write_back(Node& node) {
  if (node.dirty == 0) return;
  if (node.valid != kWhole) on_dram_(node.owner, false);
  on_dram_(node.owner, true);
  node.dirty = 0;
}

int SectorCache::insert(uint64_t sector) {
  int index = static_cast<int>(nodes_.size());
  if (nodes_.size() < capacity_) {
    nodes_.emplace_back();
  } else {
    index = oldest_;
    write_back(nodes_[static_cast<size_t>(index)]);
    unlink(index);
    remove_from_bucket(index);
  }
  int& bucket = buckets_[bucket_of(sector)];
  nodes_[static_cast<size_t>(index)] = {sector, 0, 0, 0, bucket, -1, -1};
  bucket = index;
  link_newest(index);
  return index;
}

void SectorCache::access(uint64_t sector, uint32_t bytes, bool write, int owner) {
  int index = find(sector);
  if (index < 0) {
    index = insert(sector);
  } else if (index != newest_) {
    unlink(index);
    link_newest(index);
  }
  Node& node = nodes_[static_cast<size_t>(index)];
  if (write) {
    node.valid |= bytes;
    node.dirty |= bytes;
    node.owner = owner;
  } else if ((node.valid & bytes) != bytes) {
    on_dram_(owner, false);
    node.valid = kWhole;
  }
}

void SectorCache::flush() {
  for (Node& node : nodes_) write_back(node);
}

}  // namespace singd::emulation
