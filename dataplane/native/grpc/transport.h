// Bytes over one socket that does not block, as they are or through TLS (grpc/tls.h).
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/memory.h"
#include "grpc/descriptor.h"

namespace attnserve::grpc {

enum class ReadState {
  kMore,     // there may be more to read at once
  kDrained,  // nothing until the socket is readable again
  kEnd,      // the peer sends no more
  kBroken,   // the socket or its encryption is of no more use
};

struct ReadResult {
  std::size_t size;  // bytes read; any number in every state
  ReadState state;
};

struct WriteResult {
  std::size_t size;  // bytes taken over, of which `has_unsent` may hold back some
  bool blocked;      // no more until the socket is writable again
  bool broken;
};

// Used by one thread.
class Transport {
 public:
  explicit Transport(Descriptor socket) : socket_(std::move(socket)) {}
  virtual ~Transport() = default;

  int descriptor() const { return socket_.get(); }
  virtual ReadResult read(MutableByteSpan into) = 0;
  // Also tries again what was held back before, with nothing new to write if `pieces` is empty.
  virtual WriteResult write(std::span<const iovec> pieces) = 0;
  virtual bool has_unsent() const { return false; }
  // Whether bytes of the application can pass; until then `read` and `write` shake hands.
  virtual bool established() const { return true; }
  // Names in the certificate that the peer has shown, once established: those of URIs, the common
  // name, those of hosts and of mail. None: it has shown none.
  virtual std::vector<std::string> certificate_names() const { return {}; }
  // Whether the certificate that the peer has shown would be taken now, if it has shown one.
  virtual bool peer_is_trusted() { return true; }
  // Says that nothing more will be written.
  virtual void end_output();
  // Bytes that the socket took and the peer's system does not have yet.
  std::size_t unacknowledged() const;
  // Closing the socket throws away what it has not sent, instead of trying for minutes.
  void discard_output();

 private:
  Descriptor socket_;
};

std::unique_ptr<Transport> plain_transport(Descriptor socket);

// Writes to a socket, without SIGPIPE.
WriteResult write_to_socket(int descriptor, std::span<const iovec> pieces);
// Reads from a socket.
ReadResult read_from_socket(int descriptor, MutableByteSpan into);

}  // namespace attnserve::grpc
