// A session as a sequence of chunks, to keep it or to move it to another server.
//
// Each chunk is a header of 64 bytes and a payload. Numbers are little-endian.
//
//   0   8  "attnkv" and two zero bytes
//   8   4  version of the format: 2
//   12  4  index of the chunk
//   16  4  1 if it is the last one, else 0
//   20  4  zero
//   24  8  bytes of the payload
//   32  16 random, the same in all chunks of one export
//   48  16 the beginning of SHA-256 of bytes 0 to 48 and the SHA-256 of the payload
//
// The payload of chunk 0 says what the session is: see write_description in kv_chunk.cc. The
// others together are the pages of layer 0, 1, ..., each layer's in order, without those that its
// window gave back. A page's tokens that the session does not hold are zero.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/clock.h"
#include "base/memory.h"
#include "sessions/kv_spec.h"

namespace attnserve::sessions {

class KvSession;
class KvSessions;

struct ExportedSession {
  SessionSpec spec;
  std::uint64_t length = 0, max_tokens = 0, reserved_tokens = 0;
  std::uint64_t cross_length = 0, cross_tokens = 0;
  // Of each layer with a window: the first page after the kept ones that is there.
  std::vector<std::uint32_t> first_pages;
};

// What chunk 0 of an export says. Throws RequestError: DATA_LOSS, it was changed or is no such
// chunk; FAILED_PRECONDITION, of another version.
ExportedSession read_exported(ByteSpan chunk);

// Where in a session's pages an export or import is.
class PageCursor {
 public:
  explicit PageCursor(const KvSession& session);  // lives as long

  bool ended() const { return layer_ == kEnd; }
  // Until then:
  std::int64_t page() const;                      // its offset in the cache
  std::size_t tokens() const;                     // from its first one to the layer's last one
  std::size_t offset() const { return offset_; }  // in the page
  std::size_t left_in_page() const;
  void advance(std::size_t bytes);  // at most what is left in the page

 private:
  static constexpr std::size_t kEnd = ~std::size_t{0};
  void skip();  // to the next page that is there

  const KvSession* session_;
  std::size_t layer_ = 0, page_ = 0, offset_ = 0;
};

// Owned by one thread at a time. KvSessions outlives it.
class KvExport {
 public:
  KvExport(KvExport&&) noexcept;
  KvExport& operator=(KvExport&&) = delete;
  ~KvExport();

  // The next chunk, of at most `most` bytes (chunk 0 takes what it needs); none after the last.
  Bytes next(std::size_t most);
  bool ended() const { return ended_; }

 private:
  friend class KvSessions;
  friend class KvDeparture;
  // `owns`: the snapshot is to be given back in the end.
  KvExport(KvSessions& store, std::shared_ptr<KvSession> snapshot, std::uint64_t reserved,
           bool owns);
  Bytes describe() const;
  Bytes read_pages(std::size_t most);

  KvSessions* store_;
  std::shared_ptr<KvSession> snapshot_;
  std::uint64_t reserved_;  // of the session itself
  bool owns_;
  std::array<std::byte, 16> nonce_{};
  PageCursor at_;  // what comes next
  std::uint32_t index_ = 0;
  bool ended_ = false;
};

// Owned by one thread at a time. KvSessions outlives it. Let go before `finish`: never there.
class KvImport {
 public:
  KvImport(KvImport&&) noexcept;
  KvImport& operator=(KvImport&&) = delete;
  ~KvImport();

  // The next chunk, chunk 0 first. Throws RequestError DATA_LOSS: changed, left out, of another
  // export, too long; the import is then of no use.
  void add(ByteSpan chunk);
  // Throws RequestError DATA_LOSS if chunks are missing.
  SessionState finish();

 private:
  friend class KvSessions;
  KvImport(KvSessions& store, std::shared_ptr<KvSession> session, Duration lease,
           std::span<const PageHash> prefix_hashes);

  KvSessions* store_;
  std::shared_ptr<KvSession> session_;
  Duration lease_;
  std::vector<PageHash> chain_;  // keys of its first full pages
  std::array<std::byte, 16> nonce_{};
  PageCursor at_;  // what comes next
  std::uint32_t index_ = 0;
  bool ended_ = false;
};

}  // namespace attnserve::sessions
