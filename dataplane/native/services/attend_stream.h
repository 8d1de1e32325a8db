// AttendStream of attnserve.v1.AttentionService: many requests in flight, tensors in chunks.
#pragma once

#include <memory>

#include "grpc/call.h"
#include "services/core.h"

namespace attnserve::services {

std::unique_ptr<grpc::CallHandler> attend_stream_handler(Core& core,
                                                         std::shared_ptr<grpc::Call> call);

}  // namespace attnserve::services
