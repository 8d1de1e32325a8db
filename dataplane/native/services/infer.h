// ModelInfer and ModelStreamInfer of inference.GRPCInferenceService.
#pragma once

#include <memory>

#include "services/unary.h"

namespace attnserve::services {

UnaryBehaviour model_infer(Core& core);
std::unique_ptr<grpc::CallHandler> model_stream_infer_handler(Core& core,
                                                              std::shared_ptr<grpc::Call> call);

// Checks and submits one request, or hands it to the control plane if its model takes tokens.
// `stream`: it came by ModelStreamInfer. Throws RequestError.
void begin_infer(Core& core, Bytes message, const grpc::CallInfo& info,
                 const std::shared_ptr<schedule::RequestContext>& request, Admitted admitted,
                 bool stream, Deliver deliver);

}  // namespace attnserve::services
