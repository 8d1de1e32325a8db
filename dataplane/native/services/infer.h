// ModelInfer and ModelStreamInfer of inference.GRPCInferenceService.
#pragma once

#include <memory>
#include <string>

#include "services/unary.h"

namespace attnserve::services {

UnaryBehaviour model_infer(Core& core);
std::unique_ptr<grpc::CallHandler> model_stream_infer_handler(Core& core,
                                                              std::shared_ptr<grpc::Call> call);

// What a request calls itself, for an answer that says which one failed.
struct InferNames {
  std::string id, model_name;
};

// Checks and submits one request, or hands it to the control plane if its model takes tokens.
// `names`: of a request of ModelStreamInfer, filled once they are known; null: of ModelInfer.
// Throws RequestError.
void begin_infer(Core& core, Bytes message, const grpc::CallInfo& info,
                 const std::shared_ptr<schedule::RequestContext>& request, Admitted admitted,
                 InferNames* names, Deliver deliver);

}  // namespace attnserve::services
