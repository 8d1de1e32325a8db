#include "requests/kv_room.h"

#include <cstring>
#include <string>

#include "base/text.h"
#include "requests/kv_sessions.h"
#include "requests/refusal.h"
#include "sessions/kv_sessions.h"

namespace attnserve::requests {

std::uint64_t checked_tokens(std::string_view field, std::uint64_t given, std::uint64_t least,
                             std::uint64_t most) {
  if (given < least || given > most) {
    refuse(field, std::to_string(given), text(least, "..", most));
  }
  return given;
}

sessions::Growth checked_room(std::string_view field, std::uint64_t max_tokens,
                              std::uint64_t reserved_tokens) {
  checked_tokens(text(field, "max_tokens"), max_tokens, 1, sessions::kMostTokens);
  if (reserved_tokens > max_tokens) {
    refuse(text(field, "reserved_tokens"), std::to_string(reserved_tokens),
           text("0..", max_tokens, ", max_tokens"));
  }
  return {max_tokens, reserved_tokens};
}

std::vector<sessions::PageHash> checked_hashes(std::string_view field, ByteSpan bytes) {
  if (bytes.size() % sessions::kPageHashBytes != 0) {
    refuse(field, text(bytes.size(), " bytes"),
           text(sessions::kPageHashBytes, " bytes for each page"));
  }
  std::vector<sessions::PageHash> hashes(bytes.size() / sessions::kPageHashBytes);
  if (!bytes.empty()) std::memcpy(hashes.data(), bytes.data(), bytes.size());
  return hashes;
}

void check_import(const wire::ImportSession& message) {
  if (message.chunk.data.empty()) refuse("chunk.data", "nothing", "at least one byte");
}

}  // namespace attnserve::requests
