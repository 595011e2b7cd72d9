// A model of L2: 32-byte sectors, of which the least recently used one makes room for another. A
// read that misses reads a sector from DRAM; written sectors go to DRAM when they are thrown out or
// flushed, and one that was written only in part is read first. Sectors whose last access was a
// streaming one are the first to go: they share 1/32 of the cache.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace singd::emulation {

constexpr int kSectorBytes = 32;

class SectorCache {
 public:
  // on_dram(owner, write) is told of every sector that moves; its owner is who read or wrote it.
  SectorCache(int64_t bytes, std::function<void(int owner, bool write)> on_dram);
  // Bit i of `bytes` is byte i of the sector.
  void access(uint64_t sector, uint32_t bytes, bool write, bool streaming, int owner);
  // The sector is not needed any more: it leaves without being written.
  void discard(uint64_t sector);
  void flush();

 private:
  struct Node {
    uint64_t sector;
    uint32_t valid, dirty;  // bytes
    int owner;              // who wrote it
    int chain;              // the next node of the bucket
    int newer, older;
    bool streaming;
  };
  // Sectors from the most to the least recently used one.
  struct Order {
    size_t capacity, count = 0;
    int newest = -1, oldest = -1;
  };

  size_t bucket_of(uint64_t sector) const;
  int find(uint64_t sector) const;
  int insert(uint64_t sector, bool streaming);
  void remove(int node);
  void evict_oldest(Order& order);
  Order& order_of(bool streaming) { return streaming ? streaming_ : kept_; }
  void link_newest(int node, bool streaming);
  void unlink(int node);
  void remove_from_bucket(int node);
  void write_back(Node& node);

  std::function<void(int, bool)> on_dram_;
  std::vector<int> buckets_;
  std::vector<Node> nodes_;
  std::vector<int> free_;  // nodes without a sector
  Order kept_, streaming_;
};

}  // namespace singd::emulation
