// Copies from global to shared memory that the running thread has begun and not yet waited for.
// Until it has, their destination holds 0xFF bytes, NaN in every floating-point type: a wait that
// is missing shows as a wrong result.
#pragma once

#include <cstddef>

namespace singd::emulation {

constexpr size_t kCopyBytes = 16;

// Zeros if `from` is null.
void begin_copy(void* to, const void* from);
void commit_copies();
// Those of all groups but the last `groups`.
void land_copies(int groups);

// For the emulator: before a block; whether a thread's copies are all where they belong.
void forget_copies();
bool copies_landed(int thread);

}  // namespace singd::emulation
