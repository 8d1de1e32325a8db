// The format of exported sessions, which kv_transfer.h describes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/memory.h"
#include "sessions/kv_transfer.h"

namespace attnserve::sessions {

constexpr std::size_t kChunkHeaderBytes = 64;
constexpr std::size_t kChunkNonceBytes = 16;

struct Chunk {
  std::uint32_t index = 0;
  bool last = false;
  std::array<std::byte, kChunkNonceBytes> nonce{};
  ByteSpan payload;  // of the bytes that were read
};

// Throws RequestError: DATA_LOSS, it was changed or is no chunk; FAILED_PRECONDITION, of another
// version.
Chunk read_chunk(ByteSpan bytes);
[[noreturn]] void refuse_chunk(std::string_view what);  // DATA_LOSS

// Fills in the header of a chunk whose payload is there.
void seal_chunk(Bytes& chunk, std::uint32_t index, bool last, ByteSpan nonce);
// Chunk 0, to be sealed.
Bytes description_chunk(const ExportedSession& session);

}  // namespace attnserve::sessions
