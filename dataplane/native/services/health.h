// grpc.health.v1.Health: answered by the transport's own threads, whatever else is busy.
#pragma once

#include <memory>
#include <string_view>

#include "services/unary.h"

namespace attnserve::services {

UnaryBehaviour health_check(Core& core);
std::unique_ptr<grpc::CallHandler> health_watch_handler(Core& core,
                                                        std::shared_ptr<grpc::Call> call);

}  // namespace attnserve::services
