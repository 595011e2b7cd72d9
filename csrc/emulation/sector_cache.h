// A model of L2: 32-byte sectors, of which the least recently used one makes room for another. A
// read that misses reads a sector from DRAM; written sectors go to DRAM when they are thrown out or
// flushed, and one that was written only in part is read first.
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
  void access(uint64_t sector, uint32_t bytes, bool write, int owner);
  void flush();

 private:
  struct Node {
    uint64_t sector;
    uint32_t valid, dirty;  // bytes
    int owner;              // who wrote it
    int chain;              // the next node of the bucket
    int newer, older;
  };
  size_t bucket_of(uint64_t sector) const;
  int find(uint64_t sector) const;
  int insert(uint64_t sector);
  void link_newest(int node);
  void unlink(int node);
  void remove_from_bucket(int node);
  void write_back(Node& node);

  size_t capacity_;
  std::function<void(int, bool)> on_dram_;
  std::vector<int> buckets_;
  std::vector<Node> nodes_;
  int newest_ = -1, oldest_ = -1;
};

}  // namespace singd::emulation
