// Methods with one request and one answer.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "grpc/call.h"
#include "services/core.h"
#include "services/exchange.h"

namespace attnserve::services {

// The answer of one call, which is given and counted exactly once, from any thread.
class Reply {
 public:
  Reply(Core& core, std::shared_ptr<grpc::Call> call, std::string method)
      : core_(core), call_(std::move(call)), method_(std::move(method)) {}

  void deliver(Delivery delivery);
  // The call ended before it was answered.
  void ended(Code reason);
  bool over() const { return counted_; }  // answered, or nobody waits any more
  const grpc::CallInfo& info() const { return call_->info(); }
  const std::string& method() const { return method_; }

 private:
  bool first();

  Core& core_;
  const std::shared_ptr<grpc::Call> call_;
  const std::string method_;
  std::atomic<bool> counted_{false};
};

// What a method does with its one message. Errors that it throws become the call's status. It
// answers by `reply`, now or later.
using UnaryBehaviour = std::function<void(Bytes message, const std::shared_ptr<Reply>& reply,
                                          const std::shared_ptr<schedule::RequestContext>& request,
                                          Admitted admitted)>;

// A handler that gathers the message and runs the behaviour once it is there.
std::unique_ptr<grpc::CallHandler> unary_handler(Core& core, std::shared_ptr<grpc::Call> call,
                                                 std::string method, Admitted admitted,
                                                 UnaryBehaviour behaviour);

// "message: given nothing; allowed: one request of METHOD".
Status no_message(const std::string& method);
// Of the one request of a call, whose message is there.
std::shared_ptr<schedule::RequestContext> request_context(const grpc::CallInfo& info);
// Of one of a stream's, which calls it `id`.
std::shared_ptr<schedule::RequestContext> stream_request(const grpc::CallInfo& info,
                                                         std::string_view id);

}  // namespace attnserve::services
