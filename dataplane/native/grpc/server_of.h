// A server of connections of any kind: what Server::create builds on, and tests.
#pragma once

#include <memory>

#include "grpc/link.h"
#include "grpc/server.h"

namespace attnserve::grpc {

std::unique_ptr<Server> server_of(Service& service, ConnectionFactory factory,
                                  ServerOptions options);

}  // namespace attnserve::grpc
