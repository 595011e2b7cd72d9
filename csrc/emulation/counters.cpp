#include "counters.h"

#include <algorithm>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulator.h"
#include "sector_cache.h"

namespace singd::emulation {

bool counting = false;

namespace {

constexpr int kWarp = 32;
constexpr int kBanks = 32;
constexpr int kBankBytes = 4;
constexpr int kPhaseBytes = kBanks * kBankBytes;

enum class Kind { kLoad, kStore, kAtomic, kShared };

// One access of a warp: the lanes that have come to it so far.
struct Access {
  uint64_t number = 0;  // in the order of their first lanes
  uint32_t lanes = 0;
  uintptr_t address[kWarp];
};

// One place of a kernel's code, for one warp.
struct Place {
  Kind kind;
  size_t bytes;  // a lane
  bool streaming;
  uint32_t times[kWarp] = {};    // how often each lane has been here
  uint32_t first = 0;            // which time the first one of `accesses` is
  size_t head = 0;               // where that is; what is before it is done
  std::vector<Access> accesses;  // those that lanes are still to come to
};

struct Warp {
  std::unordered_map<uintptr_t, Place> places;
};

struct Sector {
  uint64_t index;
  uint32_t bytes;
};

int bit_count(uint32_t bits) { return __builtin_popcount(bits); }

class Counting {
 public:
  explicit Counting(int64_t l2_bytes)
      : l2_(l2_bytes, [this](int owner, bool write) {
          Counters& c = kernels_[static_cast<size_t>(owner)];
          (write ? c.dram_bytes_written : c.dram_bytes_read) += kSectorBytes;
        }) {}

  void launch(const char* kernel, int64_t blocks, int threads) {
    const auto found = numbers_.try_emplace(kernel, static_cast<int>(kernels_.size()));
    if (found.second) kernels_.emplace_back();
    kernel_ = found.first->second;
    current().launches += 1;
    current().blocks += blocks;
    threads_ = threads;
    warps_.assign(static_cast<size_t>((threads + kWarp - 1) / kWarp), Warp{});
  }

  void add(Kind kind, const void* site, const void* p, size_t bytes, bool streaming = false) {
    const unsigned thread = running.thread.x;
    const unsigned warp = thread / kWarp, lane = thread % kWarp;
    // An address of code and two more bits.
    const uintptr_t key = reinterpret_cast<uintptr_t>(site) * 4 + static_cast<uintptr_t>(kind);
    Place& place = warps_[warp].places[key];
    place.kind = kind;
    place.bytes = bytes;
    place.streaming = streaming;
    const size_t at = place.head + (place.times[lane]++ - place.first);
    if (at == place.accesses.size()) {
      place.accesses.emplace_back();
      place.accesses.back().number = next_number_++;
    }
    Access& access = place.accesses[at];
    access.lanes |= 1u << lane;
    access.address[lane] = reinterpret_cast<uintptr_t>(p);
    if (access.lanes != lanes_of(warp)) return;
    finish(place, access);
    ++place.first;
    if (++place.head == place.accesses.size()) {
      place.accesses.clear();
      place.head = 0;
    }
  }

  // Accesses that not all lanes have come to, in the order in which they began.
  void converge(size_t warp) {
    pending_.clear();
    for (auto& item : warps_[warp].places) {
      Place& place = item.second;
      for (size_t i = place.head; i < place.accesses.size(); ++i) {
        pending_.emplace_back(&place, place.accesses[i]);
      }
    }
    std::sort(pending_.begin(), pending_.end(),
              [](const auto& a, const auto& b) { return a.second.number < b.second.number; });
    for (const auto& [place, access] : pending_) finish(*place, access);
    for (auto& item : warps_[warp].places) {
      Place& place = item.second;
      place.accesses.clear();
      place.head = 0;
      place.first = 0;
      std::fill(std::begin(place.times), std::end(place.times), 0u);
    }
  }
  void converge_all() {
    for (size_t warp = 0; warp < warps_.size(); ++warp) converge(warp);
  }

  void matrix(const char* p, size_t stride_bytes) {
    constexpr size_t kRows = 16, kRowBytes = 32, kPiece = 16, kRowsOfPhase = 8;
    for (size_t column = 0; column < kRowBytes; column += kPiece) {
      for (size_t row = 0; row < kRows; row += kRowsOfPhase) {
        uintptr_t addresses[kRowsOfPhase];
        for (size_t i = 0; i < kRowsOfPhase; ++i) {
          addresses[i] = reinterpret_cast<uintptr_t>(p + (row + i) * stride_bytes + column);
        }
        count_phase(addresses, static_cast<int>(kRowsOfPhase), kPiece);
      }
    }
  }

  void discard(uintptr_t address, size_t bytes) {
    for (size_t i = 0; i < bytes; i += kSectorBytes) l2_.discard((address + i) / kSectorBytes);
  }

  std::map<std::string, Counters> finish_counting() {
    l2_.flush();
    std::map<std::string, Counters> result;
    for (const auto& item : numbers_) {
      result[item.first] = kernels_[static_cast<size_t>(item.second)];
    }
    return result;
  }

 private:
  Counters& current() { return kernels_[static_cast<size_t>(kernel_)]; }

  uint32_t lanes_of(unsigned warp) const {
    const int lanes = std::min(kWarp, threads_ - static_cast<int>(warp) * kWarp);
    return lanes == kWarp ? 0xFFFFFFFFu : (1u << lanes) - 1;
  }

  void finish(const Place& place, const Access& access) {
    if (place.kind == Kind::kShared) {
      finish_shared(place, access);
      return;
    }
    begin_sectors();
    for (int lane = 0; lane < kWarp; ++lane) {
      if (access.lanes >> lane & 1) add_sector(access.address[lane], place.bytes);
    }
    const int lanes = bit_count(access.lanes);
    const int64_t bytes = static_cast<int64_t>(place.bytes) * lanes;
    current().bytes_by_width[__builtin_ctzll(place.bytes)] += bytes;
    if (place.kind == Kind::kAtomic) current().atomics += lanes;
    if (place.kind != Kind::kStore) move_sectors(false, place.streaming, bytes);
    if (place.kind != Kind::kLoad) move_sectors(true, place.streaming, bytes);
  }

  void begin_sectors() { sector_count_ = 0; }

  void add_sector(uintptr_t address, size_t bytes) {
    const uint64_t index = address / kSectorBytes;
    const uint32_t mask =
        static_cast<uint32_t>(((uint64_t{1} << bytes) - 1) << address % kSectorBytes);
    for (int i = sector_count_ - 1; i >= 0; --i) {
      if (sectors_[i].index != index) continue;
      sectors_[i].bytes |= mask;
      return;
    }
    sectors_[sector_count_++] = {index, mask};
  }

  void move_sectors(bool write, bool streaming, int64_t requested) {
    int64_t distinct = 0;
    for (int i = 0; i < sector_count_; ++i) {
      distinct += bit_count(sectors_[i].bytes);
      l2_.access(sectors_[i].index, sectors_[i].bytes, write, streaming, kernel_);
    }
    const int64_t least = (distinct + kSectorBytes - 1) / kSectorBytes;
    Counters& c = current();
    (write ? c.bytes_written : c.bytes_read) += requested;
    (write ? c.sectors_written : c.sectors_read) += sector_count_;
    (write ? c.least_sectors_written : c.least_sectors_read) += least;
  }

  void finish_shared(const Place& place, const Access& access) {
    const int bytes = std::max(static_cast<int>(place.bytes), kBankBytes);
    const int lanes_of_phase = kPhaseBytes / bytes;
    for (int first = 0; first < kWarp; first += lanes_of_phase) {
      uintptr_t addresses[kWarp];
      int count = 0;
      for (int lane = first; lane < first + lanes_of_phase; ++lane) {
        if (access.lanes >> lane & 1) addresses[count++] = access.address[lane];
      }
      if (count > 0) count_phase(addresses, count, bytes);
    }
  }

  // A phase takes as many turns as one bank has distinct words to serve.
  void count_phase(const uintptr_t* addresses, int count, size_t bytes) {
    uintptr_t words[kBanks][kBanks];
    int turns[kBanks] = {};
    int most = 0;
    for (int i = 0; i < count; ++i) {
      for (size_t offset = 0; offset < bytes; offset += kBankBytes) {
        const uintptr_t word = (addresses[i] + offset) / kBankBytes;
        uintptr_t* bank = words[word % kBanks];
        int& n = turns[word % kBanks];
        if (std::find(bank, bank + n, word) == bank + n) bank[n++] = word;
        most = std::max(most, n);
      }
    }
    current().shared_phases += 1;
    current().bank_conflicts += most - 1;
  }

  SectorCache l2_;
  std::map<std::string, int> numbers_;
  std::vector<Counters> kernels_;
  int kernel_ = 0;
  int threads_ = 0;
  uint64_t next_number_ = 0;
  std::vector<std::pair<const Place*, Access>> pending_;
  std::vector<Warp> warps_;
  Sector sectors_[2 * kWarp];  // those of the access at hand; a matrix of float touches 32 to 48
  int sector_count_ = 0;
};

std::unique_ptr<Counting> active;

}  // namespace

Counters& Counters::operator+=(const Counters& other) {
  launches += other.launches;
  blocks += other.blocks;
  bytes_read += other.bytes_read;
  bytes_written += other.bytes_written;
  sectors_read += other.sectors_read;
  sectors_written += other.sectors_written;
  least_sectors_read += other.least_sectors_read;
  least_sectors_written += other.least_sectors_written;
  for (int i = 0; i < kWidths; ++i) bytes_by_width[i] += other.bytes_by_width[i];
  atomics += other.atomics;
  dram_bytes_read += other.dram_bytes_read;
  dram_bytes_written += other.dram_bytes_written;
  shared_phases += other.shared_phases;
  bank_conflicts += other.bank_conflicts;
  return *this;
}

void start_counting(int64_t l2_bytes) {
  active = std::make_unique<Counting>(l2_bytes);
  counting = true;
}

std::map<std::string, Counters> stop_counting() {
  if (!counting) throw Error("counting was not started");
  counting = false;
  auto result = active->finish_counting();
  active.reset();
  return result;
}

void count_load(const void* p, size_t bytes, bool streaming) {
  active->add(in_shared(p, bytes) ? Kind::kShared : Kind::kLoad, __builtin_return_address(0), p,
              bytes, streaming);
}
void count_store(const void* p, size_t bytes, bool streaming) {
  active->add(in_shared(p, bytes) ? Kind::kShared : Kind::kStore, __builtin_return_address(0), p,
              bytes, streaming);
}
void count_atomic(const void* p, size_t bytes) {
  active->add(in_shared(p, bytes) ? Kind::kShared : Kind::kAtomic, __builtin_return_address(0), p,
              bytes);
}
void count_shared(const void* p, size_t bytes) {
  active->add(Kind::kShared, __builtin_return_address(0), p, bytes);
}
void count_discard(const void* p, size_t bytes) {
  active->discard(reinterpret_cast<uintptr_t>(p), bytes);
}
void count_matrix(const void* p, size_t stride_bytes) {
  active->matrix(static_cast<const char*>(p), stride_bytes);
}

void count_launch(const char* kernel, int64_t blocks, int threads) {
  active->launch(kernel, blocks, threads);
}
void count_converged(int warp) { active->converge(static_cast<size_t>(warp)); }
void count_block_converged() { active->converge_all(); }

}  // namespace singd::emulation
