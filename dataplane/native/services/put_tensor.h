// PutTensor of attnserve.v1.AttentionService: a tensor that stays in the server.
#pragma once

#include "services/unary.h"

namespace attnserve::services {

std::unique_ptr<grpc::CallHandler> put_tensor_handler(Core& core, std::shared_ptr<grpc::Call> call);

}  // namespace attnserve::services
