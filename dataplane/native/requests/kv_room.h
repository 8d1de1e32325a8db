// Room of sessions and hashes of their pages, as several actions of Decode have them.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "requests/kv_sessions.h"

namespace attnserve::requests {

// `field`: what comes before the names in messages, "sessions[0]." or nothing. Throws RequestError
// INVALID_ARGUMENT.
KvRoom checked_room(std::string_view field, std::uint64_t max_tokens,
                    std::uint64_t reserved_tokens);

// The hashes that lie one after another in `bytes`. Throws RequestError INVALID_ARGUMENT.
std::vector<PrefixHash> checked_hashes(std::string_view field, ByteSpan bytes);

// A count of tokens. Throws RequestError INVALID_ARGUMENT above `most`, or below `least`.
std::int64_t checked_tokens(std::string_view field, std::uint64_t given, std::int64_t least,
                            std::int64_t most);

}  // namespace attnserve::requests
