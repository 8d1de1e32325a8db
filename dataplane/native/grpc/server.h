// Sockets and threads: listens, accepts, and moves bytes between sockets and connections.
// One event loop (epoll) per thread; a connection stays on the loop that it was given to.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/memory.h"
#include "grpc/call.h"
#include "grpc/connection.h"

namespace attnserve::grpc {

// PEM texts. With `client_authorities` callers must show a certificate that they signed (mutual
// TLS).
struct TlsOptions {
  std::string certificate_chain;
  std::string private_key;
  std::string client_authorities;
};

struct ServerOptions {
  // "127.0.0.1:8001", "[::]:8001", "localhost:0", "unix:/run/attnserve.sock", "unix-abstract:name".
  std::vector<std::string> addresses;
  std::size_t threads = 2;
  std::optional<TlsOptions> tls;
  ConnectionOptions connection;
  std::size_t max_connections = 0;              // 0: from the descriptor limit, with a reserve
  std::size_t max_connections_per_address = 0;  // 0: no bound of its own; unix sockets count as one
  std::size_t reserved_descriptors = 64;        // kept free for metrics, models, shared memory
};

class Server {
 public:
  // Throws std::runtime_error whose message names the address or the TLS file and the reason.
  static std::unique_ptr<Server> create(Service& service, ByteBudget& budget,
                                        ServerOptions options);
  virtual ~Server() = default;  // stops at once

  // Binds and listens, then serves from threads of its own.
  virtual void start() = 0;
  // The addresses bound, ports filled in: "127.0.0.1:41231".
  virtual std::vector<std::string> addresses() const = 0;
  // Stops listening and lets calls under way end: returns when all connections have closed or at
  // the timeout, when the rest is reset (kUnavailable is what their callers see: GOAWAY came
  // before).
  virtual bool drain(Duration timeout) = 0;
  // What connections are opened with from now on; those that are open go on. Throws as `create`,
  // and then nothing has changed; or std::runtime_error if the server has no TLS.
  virtual void replace_tls(const TlsOptions& options) = 0;
  virtual std::size_t connections() const = 0;
  virtual std::size_t open_calls() const = 0;
};

}  // namespace attnserve::grpc
