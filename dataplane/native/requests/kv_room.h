// Room of sessions and hashes of their pages, as several actions of Decode have them.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "sessions/kv_spec.h"

namespace attnserve::requests {

// `field`: what comes before the names in messages, "sessions[0]." or nothing. Throws RequestError
// INVALID_ARGUMENT.
sessions::Growth checked_room(std::string_view field, std::uint64_t max_tokens,
                              std::uint64_t reserved_tokens);

// The hashes that lie one after another in `bytes`. Throws RequestError INVALID_ARGUMENT.
std::vector<sessions::PageHash> checked_hashes(std::string_view field, ByteSpan bytes);

// A count of tokens. Throws RequestError INVALID_ARGUMENT above `most`, or below `least`.
std::uint64_t checked_tokens(std::string_view field, std::uint64_t given, std::uint64_t least,
                             std::uint64_t most);

}  // namespace attnserve::requests
