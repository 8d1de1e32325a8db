// Whatever an exported session says, if its checksums are right: it is refused in words, or it is a
// session that takes steps; and no page stays.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>

#include "base/status.h"
#include "sessions/kv_chunk.h"
#include "sessions/kv_sessions.h"

namespace {

using namespace attnserve;
using namespace attnserve::sessions;

void require(bool holds) {
  if (!holds) std::abort();
}

Bytes chunk_of(ByteSpan payload, std::uint32_t index, bool last) {
  Bytes chunk = Bytes::allocate(kChunkHeaderBytes + payload.size());
  std::ranges::copy(payload, chunk.data() + kChunkHeaderBytes);
  seal_chunk(chunk, index, last, std::array<std::byte, kChunkNonceBytes>{});
  return chunk;
}

// The input: bytes of the first payload (2 bytes), it, and what the pages hold.
void import_and_step(KvSessions& store, ByteSpan input) {
  if (input.size() < 2) return;
  std::uint16_t first = 0;
  std::memcpy(&first, input.data(), sizeof first);
  input = input.subspan(2);
  const std::size_t described = std::min<std::size_t>(first, input.size());
  const Bytes chunk = chunk_of(input.first(described), 0, described == input.size());
  const ExportedSession exported = read_exported(chunk.span());
  KvImport import = store.import_session(exported, {}, Duration::zero(), "me");
  import.add(chunk.span());
  if (described < input.size()) {
    import.add(chunk_of(input.subspan(described), 1, true).span());
  }
  const SessionState state = import.finish();
  require(state.length == exported.length);
  const SessionStep asked{state.id, 1, {}, {}, 0};
  const auto step = store.begin_step(std::span(&asked, 1), "me");
  for (std::size_t layer = 0; layer < step->spec().layers.size(); ++layer) {
    KvLayer running = store.begin_layer(step, layer);
    const LayerSequence& sequence = running.sequences()[0];
    const std::size_t page_tokens = step->spec().layout.page_tokens;
    require(sequence.table.size() * page_tokens >= static_cast<std::size_t>(sequence.length));
    running.done();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  KvConfig config;
  config.max_bytes = 64 << 10;
  config.slab_bytes = 4096;
  KvSessions store(config);
  try {
    import_and_step(store, std::as_bytes(std::span(data, size)));
  } catch (const RequestError& error) {
    require(error.status().code != Code::kInternal && !error.status().message.empty());
  }
  const KvStatistics now = store.statistics();
  require(now.pages_in_use <= now.pages_promised);
  require(now.sessions > 0 || now.pages_promised == 0);
  return 0;
}
