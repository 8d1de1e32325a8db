// Numbers of bytes beyond 64 bits: callers announce shapes of any size, and messages say how much
// that would be.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace attnserve::requests {

__extension__ using Wide = unsigned __int128;

constexpr Wide kWidest = ~Wide{0};

// Of numbers that are not negative; kWidest if the result is larger.
inline Wide times(Wide one, std::int64_t other) {
  return __builtin_mul_overflow(one, static_cast<Wide>(other), &one) ? kWidest : one;
}

inline Wide plus(Wide one, Wide other) { return one > kWidest - other ? kWidest : one + other; }

std::string wide_text(Wide number);

// The product of positive factors in decimal, however long.
std::string product_text(std::span<const std::int64_t> factors);

}  // namespace attnserve::requests
