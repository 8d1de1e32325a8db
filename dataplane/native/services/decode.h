// Decode: sessions whose keys and values stay here.
//
// Requests of a stream are begun in the order in which they come. One that names a session whose
// layer is being computed waits until that is answered, and those behind it with it: so a session's
// answers come in order, and callers may send a request before the last one's answer is there.
// Requests of other sessions, other streams' above all, are computed meanwhile, and together.
#pragma once

#include "grpc/call.h"
#include "services/core.h"

namespace attnserve::services {

std::unique_ptr<grpc::CallHandler> decode_handler(Core& core, std::shared_ptr<grpc::Call> call);

}  // namespace attnserve::services
