#include "requests/wide.h"

#include <algorithm>
#include <vector>

namespace attnserve::requests {

std::string wide_text(Wide number) {
  std::string digits;
  do {
    digits += static_cast<char>('0' + static_cast<int>(number % 10));
    number /= 10;
  } while (number != 0);
  std::reverse(digits.begin(), digits.end());
  return digits;
}

std::string product_text(std::span<const std::int64_t> factors) {
  constexpr std::uint64_t kBase = 1'000'000'000;
  std::vector<std::uint64_t> parts{1};  // of nine digits, the lowest first
  for (const std::int64_t factor : factors) {
    Wide carry = 0;
    for (std::uint64_t& part : parts) {
      carry += static_cast<Wide>(part) * static_cast<std::uint64_t>(factor);
      part = static_cast<std::uint64_t>(carry % kBase);
      carry /= kBase;
    }
    for (; carry != 0; carry /= kBase) parts.push_back(static_cast<std::uint64_t>(carry % kBase));
  }
  std::string digits = std::to_string(parts.back());
  for (auto part = parts.rbegin() + 1; part != parts.rend(); ++part) {
    const std::string nine = std::to_string(*part);
    digits.append(9 - nine.size(), '0').append(nine);
  }
  return digits;
}

}  // namespace attnserve::requests
