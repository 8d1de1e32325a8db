#include "services/pending.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "base/text.h"
#include "services/unary.h"

namespace attnserve::services {
namespace {

Bytes bytes_of(std::string_view text) {
  Bytes bytes = Bytes::allocate(text.size());
  std::copy_n(reinterpret_cast<const std::byte*>(text.data()), text.size(), bytes.data());
  return bytes;
}

// Hands everything to the method's own handler, which is made when the first event comes: that is
// after the token was found good, for until then the call is paused.
class PendingHandler final : public grpc::CallHandler {
 public:
  PendingHandler(Core& core, std::shared_ptr<grpc::Call> call, std::string method,
                 std::shared_ptr<std::atomic<bool>> counted, AcceptChecked accept)
      : core_(core),
        call_(std::move(call)),
        method_(std::move(method)),
        counted_(std::move(counted)),
        accept_(std::move(accept)) {}

  void on_message(Bytes message) override {
    if (!ready()) return;
    if (message.size() > own_->max_message_bytes) {
      refuse({Code::kResourceExhausted,
              text("message: given ", message.size(), " bytes; allowed: ", own_->max_message_bytes),
              {}});
      return;
    }
    own_->handler->on_message(std::move(message));
  }
  void on_half_close() override {
    if (ready()) own_->handler->on_half_close();
  }
  void on_all_sent() override {
    if (own_) own_->handler->on_all_sent();
  }
  TimePoint due() const override { return own_ ? own_->handler->due() : kNever; }
  void on_due(TimePoint now) override {
    if (own_) own_->handler->on_due(now);
  }
  void on_held(Duration held) override {
    if (own_) own_->handler->on_held(held);
  }
  void on_end(Code reason) override {
    if (own_) {
      own_->handler->on_end(reason);
    } else if (!counted_->exchange(true)) {
      core_.statistics.count(method_, reason);
    }
  }

 private:
  bool ready() {
    if (own_) return true;
    if (refused_) return false;
    std::variant<grpc::Reception, Status> accepted = accept_(call_);
    if (auto* refused = std::get_if<Status>(&accepted)) {
      refuse(std::move(*refused));
      return false;
    }
    own_.emplace(std::move(std::get<grpc::Reception>(accepted)));
    return true;
  }

  void refuse(Status status) {
    refused_ = true;
    if (!own_ && !counted_->exchange(true)) core_.statistics.count(method_, status.code);
    call_->finish(std::move(status));
  }

  Core& core_;
  const std::shared_ptr<grpc::Call> call_;
  const std::string method_;
  const std::shared_ptr<std::atomic<bool>> counted_;
  const AcceptChecked accept_;
  std::optional<grpc::Reception> own_;
  bool refused_ = false;
};

}  // namespace

std::variant<grpc::Reception, Status> pending(Core& core, const std::shared_ptr<grpc::Call>& call,
                                              std::string_view token, const std::string& method,
                                              AcceptChecked accept) {
  const auto counted = std::make_shared<std::atomic<bool>>(false);
  auto answer = [&core, call, method, counted](Status status, Bytes) {
    if (status.ok()) return call->resume();
    if (counted->exchange(true)) return;
    core.statistics.count(method, status.code);
    call->finish(std::move(status));
  };
  const auto request =
      std::make_shared<HandledRequest>(std::string(kCheckWebToken), call->info().peer,
                                       bytes_of(token), request_context(call->info()), answer);
  call->pause();
  if (auto refused = core.web_tokens.push(request)) {
    counted->store(true);  // it is counted as what it is refused with
    request->answer({Code::kCancelled, "", {}}, {});
    return std::move(*refused);
  }
  grpc::Reception reception{
      std::make_unique<PendingHandler>(core, call, method, counted, std::move(accept)),
      core.limits.max_message_bytes};
  reception.is_known = false;
  return reception;
}

}  // namespace attnserve::services
