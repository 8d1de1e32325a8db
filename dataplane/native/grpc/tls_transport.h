// One socket's TLS; what all sockets of a server share is in grpc/tls.h.
#pragma once

#include <openssl/ssl.h>

#include <memory>

#include "grpc/transport.h"

namespace attnserve::grpc {

// The server's side of a handshake and of what follows. Throws std::bad_alloc.
// Which certificates of peers are taken now. Any thread.
class Trust {
 public:
  virtual ~Trust() = default;
  virtual std::uint64_t generation() const = 0;  // another one once others are taken
  virtual bool trusts(X509& certificate, STACK_OF(X509) * chain) const = 0;
};

// `generation`: of `trust` as `context` has it. `trust` outlives it.
std::unique_ptr<Transport> tls_transport(Descriptor socket, SSL_CTX& context, const Trust& trust,
                                         std::uint64_t generation);

}  // namespace attnserve::grpc
