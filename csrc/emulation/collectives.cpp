// Barriers, shuffles and votes.
#include <cstdint>
#include <cstring>
#include <string>

#include "block.h"
#include "counters.h"

namespace singd::emulation {

namespace {

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kSyncThreads:
      return "__syncthreads";
    case Operation::kSyncThreadsOr:
      return "__syncthreads_or";
    case Operation::kSyncThreadsAnd:
      return "__syncthreads_and";
    case Operation::kSyncThreadsCount:
      return "__syncthreads_count";
    case Operation::kSyncWarp:
      return "__syncwarp";
    case Operation::kShuffle:
      return "__shfl_sync";
    case Operation::kShuffleXor:
      return "__shfl_xor_sync";
    case Operation::kShuffleUp:
      return "__shfl_up_sync";
    case Operation::kShuffleDown:
      return "__shfl_down_sync";
    case Operation::kBallot:
      return "__ballot_sync";
    case Operation::kAny:
      return "__any_sync";
    default:
      return "__all_sync";
  }
}

}  // namespace

std::string describe(int thread) {
  const Thread& t = emulator.thread[thread];
  const std::string name = "thread " + std::to_string(thread);
  if (t.state == State::kEnded) return name + " has ended";
  return name + " waits in " + name_of(t.operation) + " (" + t.site.file + ":" +
         std::to_string(t.site.line) + ")";
}

namespace {

void check_same_operation(int a, int b) {
  const Thread& first = emulator.thread[a];
  const Thread& second = emulator.thread[b];
  if (first.operation == second.operation && first.site.line == second.site.line &&
      first.width == second.width && std::strcmp(first.site.file, second.site.file) == 0) {
    return;
  }
  fail(describe(a) + ", but " + describe(b));
}

void release_lanes(int first, unsigned mask) {
  int threads[kWarp];
  int count = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) threads[count++] = first + lane;
  }
  release(threads, count);
}

// The lane that a shuffle reads; its own where the source is outside of its group of `width`.
int source_of(const Thread& t, int lane) {
  const int base = lane & ~(t.width - 1);
  const int last = base + t.width - 1;
  int source = lane;
  switch (t.operation) {
    case Operation::kShuffle:
      return base | (t.argument & (t.width - 1));
    case Operation::kShuffleXor:
      source = lane ^ t.argument;
      return source > last ? lane : source;
    case Operation::kShuffleUp:
      source = lane - t.argument;
      return source < base ? lane : source;
    default:
      source = lane + t.argument;
      return source > last ? lane : source;
  }
}

bool is_shuffle(Operation operation) {
  return operation >= Operation::kShuffle && operation <= Operation::kShuffleDown;
}

// Gives every lane of the mask, all of which have arrived, its result.
void resolve(int first, unsigned mask) {
  unsigned ballot = 0;
  int reference = -1;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (reference < 0) reference = first + lane;
    check_same_operation(reference, first + lane);
    if (emulator.thread[first + lane].value != 0) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& t = emulator.thread[first + lane];
    if (is_shuffle(t.operation)) {
      const int source = source_of(t, lane);
      // What an absent lane would give is undefined.
      t.result = mask >> source & 1 ? emulator.thread[first + source].value : ~uint64_t{0};
    } else {
      t.result = t.operation == Operation::kAny   ? ballot != 0
                 : t.operation == Operation::kAll ? ballot == mask
                                                  : ballot;
    }
  }
}

}  // namespace

int synchronize(Operation operation, bool predicate, Site site) {
  const int thread = self();
  Thread& t = emulator.thread[thread];
  t.state = State::kAtBarrier;
  t.operation = operation;
  t.site = site;
  t.mask = 0;
  t.width = 0;
  if (emulator.at_barrier == 0) {
    emulator.first_at_barrier = thread;
    emulator.votes = 0;
  } else {
    check_same_operation(emulator.first_at_barrier, thread);
  }
  emulator.votes += predicate ? 1 : 0;
  if (++emulator.at_barrier == emulator.threads) {
    const int votes = emulator.votes;
    const int result = operation == Operation::kSyncThreadsOr    ? votes != 0
                       : operation == Operation::kSyncThreadsAnd ? votes == emulator.threads
                                                                 : votes;
    for (int i = 0; i < emulator.threads; ++i) {
      emulator.thread[i].result = static_cast<uint64_t>(result);
    }
    emulator.at_barrier = 0;
    if (counting) count_block_converged();
    release_block();
  }
  leave();
  return static_cast<int>(t.result);
}

uint64_t exchange(Operation operation, unsigned mask, uint64_t value, int argument, int width,
                  Site site) {
  const int thread = self();
  const int warp = thread / kWarp, lane = thread % kWarp;
  mask &= lanes_of(warp);
  Thread& t = emulator.thread[thread];
  t.state = State::kInWarp;
  t.operation = operation;
  t.site = site;
  t.mask = mask;
  t.argument = argument;
  t.width = width;
  t.value = value;
  if (!(mask >> lane & 1)) fail(std::string(name_of(operation)) + ": its mask lacks this lane");
  emulator.in_warp[warp] |= 1u << lane;
  bool complete = (emulator.in_warp[warp] & mask) == mask;
  for (int i = 0; complete && i < kWarp; ++i) {
    complete = !(mask >> i & 1) || emulator.thread[warp * kWarp + i].mask == mask;
  }
  if (complete) {
    resolve(warp * kWarp, mask);
    emulator.in_warp[warp] &= ~mask;
    if (counting && mask == lanes_of(warp)) count_converged(warp);
    release_lanes(warp * kWarp, mask);
  }
  leave();
  return t.result;
}

}  // namespace singd::emulation
