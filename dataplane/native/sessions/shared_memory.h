// POSIX shared memory of callers on the same host, mapped into the server. What may be used by whom,
// and why, is told in server/src/attnserve_server/shared_memory.py, whose checks and messages these are.
// Beyond it: pages are claimed when a region is registered (posix_fallocate), a region ends with the
// connection that registered it by the typed API, and an object that shrinks under a request costs that
// request alone: a SIGBUS handler puts zero pages in place and marks the region broken.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory.h"

namespace attnserve::sessions {

struct RegionStatus {
  std::string name, key;
  std::uint64_t offset = 0, byte_size = 0;
};

class Mapping;  // a mapped object; unmapped when its last user is gone

// Part of a region while a request uses it.
struct RegionView {
  MutableByteSpan bytes;
  std::shared_ptr<Mapping> mapping;
  // Whether pages of it were missing when somebody touched them: what was read is worth nothing.
  // Asked after the run; then the request fails with INVALID_ARGUMENT "... was truncated ...".
  void check_intact() const;
};

// What tells local callers apart: the host part of a peer ("127.0.0.1", "unix"). Throws RequestError
// PERMISSION_DENIED for a peer that is neither on loopback nor on a Unix socket.
std::string owner_of(std::string_view peer);

// Any thread.
class SharedRegions {
 public:
  SharedRegions(std::size_t max_regions, std::size_t max_bytes);
  ~SharedRegions();
  // Under a name of the caller's choice, until it is unregistered (Triton's extension).
  void add(std::string_view name, std::string_view key, std::uint64_t offset, std::uint64_t byte_size,
           const std::string& owner);
  // Under a name that cannot be guessed (128 random bits, hexadecimal), until it is unregistered or
  // `connection` has closed. In no status; `remove_all` leaves it.
  std::string add_private(std::string_view key, std::uint64_t byte_size, const std::string& owner,
                          std::uint64_t connection);
  void remove(std::string_view name, const std::string& owner);       // NOT_FOUND
  void remove_all(const std::string& owner);
  void connection_closed(std::uint64_t connection);
  std::vector<RegionStatus> status(std::string_view name, const std::string& owner) const;
  RegionView view(std::string_view name, std::uint64_t offset, std::uint64_t byte_size,
                  const std::string& owner) const;
  std::size_t mapped_bytes() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace attnserve::sessions
