// POSIX shared memory of callers on the same host, mapped into the server.
//
// Who may use it. Callers who reach the server over loopback or a Unix socket: `owner_of` refuses
// all others, and what it answers keeps the regions of one kind of caller from those of another.
// Which user a local caller is, gRPC does not say; the object does: it must belong to the user that
// the server runs as. Without that, a server with more rights than its caller, above all one run by
// root, would read and write objects for callers who may not. There is no exception for root's
// objects, nor for a server run by root: either would be that very case. What remains: another
// local user who can connect can have the server read and write objects of the server's own user.
// Where that matters, run the server as a user of its own or turn shared memory off.
//
// What callers can do to an object while it is used. They may write to it: a request then computes
// with whatever was there. They may truncate it, or punch holes that a full /dev/shm cannot fill
// again: see sessions/mapping.h; it costs the requests that touched it, and no other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory.h"

namespace attnserve::sessions {

// What a caller registered: bytes [offset, offset + byte_size) of the object `key`.
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
  // Asked after the run. Throws RequestError INVALID_ARGUMENT "... was truncated after ...".
  void check_intact() const;
};

// The name of a caller that has one, with the '@' before it: "@trainer" of "unix:@trainer".
std::string_view name_of_caller(std::string_view peer);
// What tells local callers apart: the host part of a peer ("127.0.0.1", "::1", "unix"), and the
// caller's name ("unix@trainer"). Throws RequestError PERMISSION_DENIED for a peer that is neither
// on loopback nor on a Unix socket.
std::string owner_of(std::string_view peer);
// Who calls: by the name that it has, wherever it calls from ("@trainer"), else by where it calls
// from: "ipv4:10.0.0.1" of "ipv4:10.0.0.1:4242"; sockets of this machine have no ports.
std::string_view address_of(std::string_view peer);

// The registered regions, by owner and name. Any thread; `add` and `add_private` take as long as
// the system needs to find and clear the pages, so no loop calls them.
class SharedRegions {
 public:
  // At most so many regions at once (0: none, shared memory is off), and so many bytes of objects
  // that are mapped, those still in use after they were unregistered included.
  SharedRegions(std::size_t max_regions, std::size_t max_bytes);
  ~SharedRegions();

  // Maps part of an object under a name of the caller's choice (1 to 256 characters), until it is
  // unregistered (Triton's extension). `key` is as shm_open(3) takes it; the leading slash may be
  // left out. Throws RequestError: INVALID_ARGUMENT, a value is out of range; ALREADY_EXISTS, the
  // owner has a region of that name; NOT_FOUND, no such object; PERMISSION_DENIED, it is not the
  // server's user's, or may not be opened; RESOURCE_EXHAUSTED, over the limits, or /dev/shm is
  // full; UNIMPLEMENTED, this host has no /dev/shm.
  void add(std::string_view name, std::string_view key, std::uint64_t offset,
           std::uint64_t byte_size, const std::string& owner);
  // Maps the first bytes of an object under a name that cannot be guessed (128 random bits,
  // hexadecimal), until it is unregistered or `connection` has closed. In no status; `remove_all`
  // leaves it. Throws as `add`; CANCELLED if the connection has closed meanwhile.
  std::string add_private(std::string_view key, std::uint64_t byte_size, const std::string& owner,
                          std::uint64_t connection);
  // Forgets a region; it is unmapped once no view of it is in use. Throws RequestError NOT_FOUND.
  void remove(std::string_view name, const std::string& owner);
  void remove_all(const std::string& owner);
  void connection_closed(std::uint64_t connection);
  // The owner's regions; with a name, that one alone. Throws RequestError NOT_FOUND.
  std::vector<RegionStatus> status(std::string_view name, const std::string& owner) const;
  // Throws RequestError: NOT_FOUND, the owner has no such region; INVALID_ARGUMENT, the bytes reach
  // beyond it, or beyond the object as it is now.
  RegionView view(std::string_view name, std::uint64_t offset, std::uint64_t byte_size,
                  const std::string& owner) const;
  std::size_t mapped_bytes() const;

 private:
  struct Region;
  struct State;
  void add_region(RegionStatus status, const std::string& owner, bool named,
                  std::uint64_t connection);

  std::unique_ptr<State> state_;
};

}  // namespace attnserve::sessions
