// Methods of the control plane: their messages are handed over, and its answers sent.
#pragma once

#include <memory>
#include <string>

#include "services/handlers.h"
#include "services/unary.h"

namespace attnserve::services {

// Hands a request over; `deliver` is called with its answer, or now if the queue is full.
void hand_over(HandlerQueue& queue, std::string path, std::string peer, Bytes message,
               std::shared_ptr<schedule::RequestContext> request, Admitted admitted,
               Deliver deliver);

// A method with one request and one answer.
UnaryBehaviour handled(HandlerQueue& queue, std::string path);

// A method that answers each message of a stream by one, in order (server reflection).
std::unique_ptr<grpc::CallHandler> handled_stream(Core& core, HandlerQueue& queue,
                                                  std::shared_ptr<grpc::Call> call);

}  // namespace attnserve::services
