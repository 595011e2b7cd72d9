#include "sector_cache.h"

#include <algorithm>
#include <utility>

namespace singd::emulation {

namespace {

constexpr uint32_t kWhole = 0xFFFFFFFFu;
constexpr int64_t kStreamingShare = 32;

size_t power_of_two(size_t at_least) {
  size_t n = 1;
  while (n < at_least) n *= 2;
  return n;
}

}  // namespace

SectorCache::SectorCache(int64_t bytes, std::function<void(int owner, bool write)> on_dram)
    : on_dram_(std::move(on_dram)) {
  const int64_t sectors = bytes / kSectorBytes;
  streaming_.capacity = static_cast<size_t>(std::max<int64_t>(sectors / kStreamingShare, 1));
  kept_.capacity = static_cast<size_t>(std::max<int64_t>(sectors - sectors / kStreamingShare, 1));
  buckets_.assign(power_of_two(2 * (kept_.capacity + streaming_.capacity)), -1);
}

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

void SectorCache::link_newest(int index, bool streaming) {
  Node& node = nodes_[static_cast<size_t>(index)];
  Order& order = order_of(streaming);
  node.streaming = streaming;
  node.newer = -1;
  node.older = order.newest;
  if (order.newest >= 0) nodes_[static_cast<size_t>(order.newest)].newer = index;
  order.newest = index;
  if (order.oldest < 0) order.oldest = index;
  ++order.count;
}

void SectorCache::unlink(int index) {
  const Node& node = nodes_[static_cast<size_t>(index)];
  Order& order = order_of(node.streaming);
  (node.newer < 0 ? order.newest : nodes_[static_cast<size_t>(node.newer)].older) = node.older;
  (node.older < 0 ? order.oldest : nodes_[static_cast<size_t>(node.older)].newer) = node.newer;
  --order.count;
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

void SectorCache::remove(int index) {
  unlink(index);
  remove_from_bucket(index);
  free_.push_back(index);
}

void SectorCache::evict_oldest(Order& order) {
  write_back(nodes_[static_cast<size_t>(order.oldest)]);
  remove(order.oldest);
}

int SectorCache::insert(uint64_t sector, bool streaming) {
  int index;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else {
    index = static_cast<int>(nodes_.size());
    nodes_.emplace_back();
  }
  int& bucket = buckets_[bucket_of(sector)];
  nodes_[static_cast<size_t>(index)] = {sector, 0, 0, 0, bucket, -1, -1, streaming};
  bucket = index;
  link_newest(index, streaming);
  return index;
}

void SectorCache::access(uint64_t sector, uint32_t bytes, bool write, bool streaming, int owner) {
  int index = find(sector);
  if (index < 0) {
    index = insert(sector, streaming);
  } else {
    unlink(index);
    link_newest(index, streaming);
  }
  Order& order = order_of(streaming);
  if (order.count > order.capacity) evict_oldest(order);
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

void SectorCache::discard(uint64_t sector) {
  const int index = find(sector);
  if (index < 0) return;
  nodes_[static_cast<size_t>(index)].dirty = 0;
  remove(index);
}

void SectorCache::flush() {
  for (Node& node : nodes_) write_back(node);
}

}  // namespace singd::emulation
