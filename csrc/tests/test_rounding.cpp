// Stochastic rounding to bfloat16: repeatable, exact where it can be, and right on average.
#include <cstring>

#include "../structures/rounding.h"
#include "check.h"

using namespace singd;
using namespace singd::tests;

namespace {

float rounded(float value, const RoundingKey& key, int64_t index) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = static_cast<uint32_t>(key.round_to_bfloat16(bits, index)) << 16;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

}  // namespace

int main() {
  const RoundingKey key = RoundingKey::make(7, 11);
  check_equal(rounded(1.5f, key, 3), 1.5f, "a bfloat16 number stays");
  check_equal(rounded(-0.0f, key, 4), 0.0f, "zero stays");
  for (const float value : {1.001f, -3.14159f, 1e-30f, 6.5e20f}) {
    const double ulp = std::ldexp(1.0, std::ilogb(value) - 7);
    double sum = 0;
    const int64_t draws = 1 << 16;
    for (int64_t i = 0; i < draws; ++i) {
      const double r = rounded(value, key, i);
      check(std::abs(r - value) < ulp, "a neighbour of the value");
      sum += r;
    }
    // The mean of uniform draws is within 5 standard errors, each at most ulp / 2 / sqrt(draws).
    check_close(sum / draws / ulp, value / ulp, 5 * 0.5 / 256, "the mean is the value");
  }
  check_equal(rounded(1.001f, key, 5), rounded(1.001f, RoundingKey::make(7, 11), 5), "repeatable");
  int differences = 0;
  for (int64_t i = 0; i < 256; ++i) {
    differences += rounded(1.001f, key, i) != rounded(1.001f, RoundingKey::make(7, 12), i);
    differences += rounded(1.001f, key, i) != rounded(1.001f, key.stream(1), i);
  }
  check(differences > 32, "steps and streams draw different numbers");
  return failures;
}
