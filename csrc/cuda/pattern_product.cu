// C = A B and h = Pi(K^T K) for the storages of one structure (formulas: pattern_product.cuh). A
// thread owns an entry; a block reads its operands from L1 and L2, whose DRAM traffic is once per
// operand. Column-bordered Gram matrices have a core of long sums, of which a warp makes each.
#include "launch.cuh"
#include "pattern_product.cuh"
#include "pattern_product.h"

namespace singd::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const Layout layout, int64_t size, const T* a, const T* b, T* c) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot < size) store(c + slot, product_at(layout, a, b, slot));
}

template <class T>
__global__ void __launch_bounds__(kThreads) core_kernel(const Layout layout, const T* k, T* h) {
  core_gram_of_block(layout, blockIdx.x, k, h);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gram_kernel(const Layout layout, int64_t size, const T* k, T* h) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot < size) store(h + slot, gram_at(layout, k, h, slot));
}

int64_t blocks_for(int64_t size) { return (size + kThreads - 1) / kThreads; }

template <class T>
void launch_product(const Layout& layout, int64_t size, const void* a, const void* b, void* c,
                    Stream stream) {
  launch({"structured_product", blocks_for(size), kThreads, stream}, product_kernel<T>, layout,
         size, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c));
}

template <class T>
void launch_gram(const Layout& layout, int64_t size, const void* k, void* h, Stream stream) {
  const T* factor = static_cast<const T*>(k);
  launch({"factor_gram_core", core_blocks(layout, kThreads), kThreads, stream}, core_kernel<T>,
         layout, factor, static_cast<T*>(h));
  launch({"factor_gram", blocks_for(size), kThreads, stream}, gram_kernel<T>, layout, size, factor,
         static_cast<T*>(h));
}

}  // namespace

void pattern_product(const Layout& layout, int64_t size, bool single, const void* a, const void* b,
                     void* c, Stream stream) {
  single ? launch_product<float>(layout, size, a, b, c, stream)
         : launch_product<double>(layout, size, a, b, c, stream);
}

void pattern_gram(const Layout& layout, int64_t size, bool single, const void* k, void* h,
                  Stream stream) {
  single ? launch_gram<float>(layout, size, k, h, stream)
         : launch_gram<double>(layout, size, k, h, stream);
}

}  // namespace singd::cuda
