// Where the shared memory of the running block lies: the dynamic one on the heap, at exactly its
// size; the static one (`__shared__ float x[32]`) in the thread-local storage of the module that
// holds the emulator and the kernels. Of thread-local variables, those that belong to a function of
// namespace singd::cuda are static shared memory; the module's symbol table says where they are.
#pragma once

#include <cstddef>

namespace singd::emulation {

// Fills static shared memory with 0xFF bytes, which are NaN in every floating-point type.
void poison_static_shared();

// How many bytes that is.
size_t static_shared_bytes();

bool in_static_shared(const void* p, size_t bytes);

}  // namespace singd::emulation
