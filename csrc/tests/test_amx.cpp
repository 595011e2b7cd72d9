// AMX's own instructions, where the processor has them: a product, and that a thread's tiles have
// the shapes that they had before. All else of tiles is in test_tiles.cpp.
#include <cstdio>
#include <cstring>

#include "../cpu/simd_amx.cpp"
#include "check.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

using namespace singd::cpu;
using namespace singd::cpu::amx;
using namespace singd::tests;

bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const unsigned both = 1u << 22 | 1u << 24;
  return __builtin_cpu_supports("avx512bf16") && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 &&
         (d & both) == both && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

// Tiles of 5 rows of 8 bytes, as another library might leave them.
TileShapes others_shapes() {
  TileShapes shapes;
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) {
    shapes.row_bytes[i] = 8;
    shapes.rows[i] = 5;
  }
  return shapes;
}

TileShapes shapes_now() {
  TileShapes shapes;
  asm volatile("sttilecfg %0" : "=m"(shapes));
  return shapes;
}

void shapes_are_restored() {
  const TileShapes others = others_shapes(), none;
  for (const TileShapes& before : {others, none}) {
    shape_tiles(before);
    const bool inside = with_tiles([] { return shapes_now().rows[7] == kTileRows; });
    check(inside, "tiles are of full size");
    const TileShapes after = shapes_now();
    check(std::memcmp(&before, &after, sizeof before) == 0, "the shapes of before are back");
  }
}

// [i, p] of the left and [p, j] of the right matrix: small integers, so that sums are exact.
int left_at(int i, int p) { return (3 * i + p) % 7 - 3; }
int right_at(int p, int j) { return (p + 5 * j) % 9 - 4; }
uint32_t bits(int value) { return Narrow<BFloat16>::of(static_cast<float>(value)).bits; }

void product() {
  alignas(64) uint32_t left[16][16], right[16][16];
  alignas(64) float sums[16][16];
  for (int row = 0; row < 16; ++row) {
    for (int p = 0; p < 16; ++p) {
      left[row][p] = bits(left_at(row, 2 * p)) | bits(left_at(row, 2 * p + 1)) << 16;
      right[p][row] = bits(right_at(2 * p, row)) | bits(right_at(2 * p + 1, row)) << 16;
    }
  }
  with_tiles([&] {
    zero_tile<0>();
    load_tile<4>(left, 64);
    load_tile<6>(right, 64);
    multiply_tiles<0, 4, 6>();
    store_tile<0>(sums, 64);
    return true;
  });
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      int sum = 0;
      for (int p = 0; p < 32; ++p) sum += left_at(i, p) * right_at(p, j);
      check_equal(sums[i][j], static_cast<float>(sum), "product of two tiles");
    }
  }
}

}  // namespace

int main() {
  if (!may_use_tiles()) {
    std::printf("skipped: this processor has no tiles that may be used\n");
    return 0;
  }
  shapes_are_restored();
  product();
  return failures;
}
#else
int main() { return 0; }
#endif
