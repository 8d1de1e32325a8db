// TLS 1.2 and later by OpenSSL, with HTTP/2 (ALPN "h2") inside and nothing else.
#pragma once

#include <memory>
#include <string>

#include "grpc/server.h"
#include "grpc/transport.h"

namespace attnserve::grpc {

// What all connections of a server share: certificate, key, whom to trust. Any thread.
class TlsContext {
 public:
  // Throws std::runtime_error that names the field of TlsOptions and the reason, never its text.
  static std::unique_ptr<TlsContext> create(const TlsOptions& options);
  virtual ~TlsContext() = default;

  // From now on. Connections that are open, or being opened, keep what they began with, but for
  // whom to trust: those whose peers' certificates would not be taken any more are told so. Throws
  // as `create`, and then nothing has changed.
  virtual void replace(const TlsOptions& options) = 0;
  // The transport's end comes before this one's. Throws std::bad_alloc.
  virtual std::unique_ptr<Transport> accept(Descriptor socket) const = 0;
};

}  // namespace attnserve::grpc
