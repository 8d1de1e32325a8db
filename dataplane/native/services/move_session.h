// MoveSession: the session of another server, which drains, with the caller that it belongs to.
#pragma once

#include <memory>

#include "grpc/call.h"
#include "services/core.h"

namespace attnserve::services {

std::unique_ptr<grpc::CallHandler> move_session_handler(Core& core,
                                                        std::shared_ptr<grpc::Call> call);

}  // namespace attnserve::services
