#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "base/half.h"

namespace attnserve {
namespace {

TEST_CASE("every half but NaN comes back from float as it was") {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = float_of_half(half);
    if (std::isnan(value)) {
      CHECK(std::isnan(float_of_half(half_of_float(value))));
    } else if (half_of_float(value) != half) {
      FAIL_CHECK("half " << bits);
    }
  }
  CHECK(float_of_half(0x3C00) == 1.0F);
  CHECK(float_of_half(0x7BFF) == 65504.0F);
  CHECK(float_of_half(0x0001) == 0x1p-24F);
  CHECK(float_of_half(0x8400) == -0x1p-14F);
  CHECK(float_of_half(0xFC00) == -std::numeric_limits<float>::infinity());
}

TEST_CASE("floats between two halves go to the nearer, ties to the even one") {
  for (std::uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const auto low = static_cast<std::uint16_t>(bits);
    const float below = float_of_half(low),
                above = float_of_half(static_cast<std::uint16_t>(bits + 1));
    const float middle = below + (above - below) / 2;  // exact
    const auto even = static_cast<std::uint16_t>(bits + (bits & 1));
    if (half_of_float(middle) != even || half_of_float(std::nextafter(middle, 0.0F)) != low ||
        half_of_float(std::nextafter(middle, above)) != bits + 1 ||
        half_of_float(-middle) != (even | 0x8000)) {
      FAIL_CHECK("above half " << bits);
    }
  }
  CHECK(half_of_float(65519.99F) == 0x7BFF);
  CHECK(half_of_float(65520.0F) == 0x7C00);
  CHECK(half_of_float(-1e30F) == 0xFC00);
  CHECK(half_of_float(0x1p-25F) == 0);
  CHECK(half_of_float(-0.0F) == 0x8000);
}

TEST_CASE("bfloat16 is the upper half of a float, rounded") {
  CHECK(float_of_bfloat16(0x3F80) == 1.0F);
  CHECK(bfloat16_of_float(1.0F) == 0x3F80);
  CHECK(bfloat16_of_float(1.0F + 0x1p-8F) == 0x3F80);  // a tie, to even
  CHECK(bfloat16_of_float(1.0F + 0x1p-8F + 0x1p-20F) == 0x3F81);
  CHECK(bfloat16_of_float(1.0F + 0x1p-7F + 0x1p-8F) == 0x3F82);  // a tie, to even
  CHECK(bfloat16_of_float(std::numeric_limits<float>::max()) == 0x7F80);
  CHECK(bfloat16_of_float(-std::numeric_limits<float>::infinity()) == 0xFF80);
  CHECK(std::isnan(float_of_bfloat16(bfloat16_of_float(std::bit_cast<float>(0x7F800001U)))));
}

}  // namespace
}  // namespace attnserve
