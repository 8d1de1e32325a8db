// FP16 and BF16 to float and back, rounded to nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

namespace attnserve {

inline float float_of_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1FU;
  const std::uint32_t mantissa = half & 0x3FFU;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000U | (mantissa << 13));
  if (exponent == 0) {  // zero, or a multiple of the smallest subnormal number, 2^-24
    const float size = static_cast<float>(mantissa) * 0x1p-24F;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(size));
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline std::uint16_t half_of_float(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  std::uint32_t size = bits & 0x7FFFFFFFU;
  if (size > 0x7F800000U)
    size = 0x7E00U | ((size >> 13) & 0x3FFU);  // NaN stays one
  else if (size >= 0x477FF000U)
    size = 0x7C00U;                // 65520 or more: infinity
  else if (size >= 0x38800000U) {  // 2^-14 or more: normal
    size = (size + 0xFFFU + ((size >> 13) & 1U) - 0x38000000U) >> 13;
  } else {
    // The last bit of 0.5 is 2^-24, that of subnormal halves: adding it rounds to that.
    size = std::bit_cast<std::uint32_t>(std::bit_cast<float>(size) + 0.5F) - 0x3F000000U;
  }
  return static_cast<std::uint16_t>(sign | size);
}

inline float float_of_bfloat16(std::uint16_t value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16);
}

inline std::uint16_t bfloat16_of_float(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) {
    return static_cast<std::uint16_t>((bits >> 16) | 0x40U);  // NaN stays one
  }
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

}  // namespace attnserve
