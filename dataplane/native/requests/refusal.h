// How checks refuse: one sentence, and what callers sent shown in it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/status.h"
#include "base/text.h"

namespace attnserve::requests {

// Throws RequestError INVALID_ARGUMENT "FIELD: given GIVEN; allowed: ALLOWED".
[[noreturn]] inline void refuse(std::string_view field, std::string_view given,
                                std::string_view allowed) {
  throw RequestError(invalid_argument(field, given, allowed));
}

// What a status cannot hold anyway, since it is cut to less, is not written out: callers may send
// names and shapes of many megabytes.
constexpr std::size_t kMostShown = 1024;

inline std::string shown(std::string_view name) {
  return quoted(first_characters(name, kMostShown));
}

inline std::string shown(std::span<const std::int64_t> values) {
  if (values.size() <= kMostShown) return list_text(values);
  return list_text(values.first(kMostShown)) + " and more";
}

}  // namespace attnserve::requests
