#include "requests/kv_room.h"

#include <cstring>
#include <string>

#include "base/text.h"
#include "requests/refusal.h"

namespace attnserve::requests {

std::int64_t checked_tokens(std::string_view field, std::uint64_t given, std::int64_t least,
                            std::int64_t most) {
  if (given < static_cast<std::uint64_t>(least) || given > static_cast<std::uint64_t>(most)) {
    refuse(field, std::to_string(given), text(least, "..", most));
  }
  return static_cast<std::int64_t>(given);
}

KvRoom checked_room(std::string_view field, std::uint64_t max_tokens,
                    std::uint64_t reserved_tokens) {
  KvRoom room;
  room.max_tokens = checked_tokens(text(field, "max_tokens"), max_tokens, 0, kMostSessionTokens);
  const bool bounded = room.max_tokens != 0;
  const std::int64_t most = bounded ? room.max_tokens : kMostSessionTokens;
  if (reserved_tokens > static_cast<std::uint64_t>(most)) {
    refuse(text(field, "reserved_tokens"), std::to_string(reserved_tokens),
           text("0..", most, bounded ? ", max_tokens" : ""));
  }
  room.reserved_tokens = static_cast<std::int64_t>(reserved_tokens);
  return room;
}

std::vector<PrefixHash> checked_hashes(std::string_view field, ByteSpan bytes) {
  if (bytes.size() % kHashBytes != 0) {
    refuse(field, text(bytes.size(), " bytes"), text(kHashBytes, " bytes for each page"));
  }
  std::vector<PrefixHash> hashes(bytes.size() / kHashBytes);
  if (!bytes.empty()) std::memcpy(hashes.data(), bytes.data(), bytes.size());
  return hashes;
}

KvRoom check_fork(const wire::ForkSession& message) {
  check_session_id(message.session_id);
  return checked_room("", message.max_tokens, message.reserved_tokens);
}

KvRoom check_import(const wire::ImportSession& message) {
  if (message.chunk.data.empty()) refuse("chunk.data", "nothing", "at least one byte");
  return checked_room("", message.max_tokens, message.reserved_tokens);
}

}  // namespace attnserve::requests
