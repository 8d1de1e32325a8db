// One socket's TLS; what all sockets of a server share is in grpc/tls.h.
#pragma once

#include <openssl/ssl.h>

#include <memory>

#include "grpc/transport.h"

namespace attnserve::grpc {

// The server's side of a handshake and of what follows. Throws std::bad_alloc.
std::unique_ptr<Transport> tls_transport(Descriptor socket, SSL_CTX& context);

}  // namespace attnserve::grpc
