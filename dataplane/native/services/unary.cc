#include "services/unary.h"

#include <utility>

#include "base/text.h"

namespace attnserve::services {
namespace {

class UnaryHandler final : public grpc::CallHandler {
 public:
  UnaryHandler(Core& core, std::shared_ptr<Reply> reply, Admitted admitted,
               UnaryBehaviour behaviour)
      : core_(core),
        reply_(std::move(reply)),
        admitted_(std::move(admitted)),
        behaviour_(std::move(behaviour)) {}

  void on_message(Bytes message) override {
    if (request_) return;  // one is all that the method takes
    request_ = request_context(reply_->info());
    admitted_.received();
    const TraceScope scope(request_->trace);
    try {
      behaviour_(std::move(message), reply_, request_, std::move(admitted_));
    } catch (...) {
      reply_->deliver({status_of(std::current_exception()), {}});
    }
  }

  void on_half_close() override {
    if (!request_) reply_->deliver({no_message(reply_->method()), {}});
  }

  void on_end(Code reason) override {
    reply_->ended(reason);
    if (request_ && reason != Code::kOk) core_.scheduler.cancel(request_);
  }

 private:
  Core& core_;
  const std::shared_ptr<Reply> reply_;
  Admitted admitted_;
  const UnaryBehaviour behaviour_;
  std::shared_ptr<schedule::RequestContext> request_;  // once the message was there
};

}  // namespace

void Reply::deliver(Delivery delivery) {
  if (!first()) return;
  if (!method_.empty()) core_.statistics.count(method_, delivery.status.code);
  if (const auto& recording = info().recording) recording->status(delivery.status.code);
  for (OutMessage& message : delivery.messages) call_->send(std::move(message));
  call_->finish(std::move(delivery.status));
}

void Reply::ended(Code reason) {
  if (!first()) return;
  if (!method_.empty()) core_.statistics.count(method_, reason);
  if (const auto& recording = info().recording) recording->status(reason);
}

bool Reply::first() { return !counted_.exchange(true); }

std::unique_ptr<grpc::CallHandler> unary_handler(Core& core, std::shared_ptr<grpc::Call> call,
                                                 std::string method, Admitted admitted,
                                                 UnaryBehaviour behaviour) {
  auto reply = std::make_shared<Reply>(core, std::move(call), std::move(method));
  return std::make_unique<UnaryHandler>(core, std::move(reply), std::move(admitted),
                                        std::move(behaviour));
}

Status no_message(const std::string& method) {
  return invalid_argument(
      "message", "nothing",
      method.empty() ? std::string("one request") : text("one request of ", method));
}

namespace {

std::shared_ptr<schedule::RequestContext> begun(const grpc::CallInfo& info) {
  auto request = std::make_shared<schedule::RequestContext>();
  request->arrived = Clock::now();
  request->deadline = info.deadline;
  const bool named = info.caller && !info.caller->name.empty();
  request->caller = named ? info.caller->number : info.connection;
  request->trace = info.recording ? info.recording->context() : info.trace;
  return request;
}

}  // namespace

std::shared_ptr<schedule::RequestContext> request_context(const grpc::CallInfo& info) {
  auto request = begun(info);
  if (info.recording) {
    request->recording = info.recording;
    request->recording->mark(tracing::Mark::kReceived, request->arrived);
  }
  return request;
}

std::shared_ptr<schedule::RequestContext> stream_request(const grpc::CallInfo& info,
                                                         std::string_view id) {
  auto request = begun(info);
  if (info.recording) request->recording = info.recording->request(id, request->arrived);
  if (request->recording) request->trace = request->recording->context();
  return request;
}

}  // namespace attnserve::services
