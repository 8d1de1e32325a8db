#include "services/move_session.h"

#include <string>
#include <utility>
#include <vector>

#include "base/text.h"
#include "requests/kv_room.h"
#include "requests/kv_sessions.h"
#include "requests/refusal.h"
#include "services/decode_transfer.h"
#include "services/put_tensor.h"
#include "services/unary.h"
#include "wire/kv_sessions.h"

namespace attnserve::services {
namespace {

constexpr std::size_t kMostCallerBytes = 512;

class MoveSessionHandler final : public grpc::CallHandler {
 public:
  MoveSessionHandler(Core& core, std::shared_ptr<grpc::Call> call)
      : core_(core),
        call_(call),
        reply_(std::make_shared<Reply>(core, std::move(call), "MoveSession")),
        pace_(core.upload_pace) {}

  void on_message(Bytes message) override {
    if (over_) return;
    const auto held = std::make_shared<const Bytes>(std::move(message));
    attempt([&] { take(held); });
  }

  void on_half_close() override {
    if (over_ || all_there_) return;
    attempt([&] {
      requests::refuse("stream", "its end before the last chunk", "all chunks of an export");
    });
  }

  void on_end(Code reason) override {
    over_ = true;
    if (coming_ && reason != Code::kOk) coming_->abandon();
    reply_->ended(reason);
  }

  // From the first chunk on, which is followed by all others at once.
  TimePoint due() const override { return over_ || all_there_ ? kNever : pace_.due(); }
  void on_due(TimePoint) override {
    attempt([&] { throw RequestError(pace_.late("stream")); });
  }
  void on_held(Duration held) override { pace_.forgive(held); }

 private:
  template <class Step>
  void attempt(const Step& step) {
    try {
      step();
    } catch (...) {
      over_ = true;
      if (coming_) coming_->abandon();
      reply_->deliver({status_of(std::current_exception()), {}});
    }
  }

  void take(const std::shared_ptr<const Bytes>& message) {
    const wire::MoveSessionRequest decoded = wire::decode_move_session(message->span());
    const wire::SessionChunk& chunk = decoded.chunk;
    if (all_there_) requests::refuse("stream", "more messages", "none after the last chunk");
    if (chunk.data.empty()) requests::refuse("chunk.data", "nothing", "at least one byte");
    if (!coming_) {
      begin(decoded);
    } else if (decoded.session) {
      requests::refuse("session", "a second one", "one, with the first chunk");
    }
    all_there_ = chunk.last;
    pace_.took(chunk.data.size(), Clock::now());
    coming_->add(chunk.index, chunk.data, chunk.last, message);
  }

  void begin(const wire::MoveSessionRequest& decoded) {
    if (!decoded.session) requests::refuse("session", "nothing", "one, with the first chunk");
    const wire::MovingSession& moving = *decoded.session;
    if (moving.caller.empty() || moving.caller.size() > kMostCallerBytes) {
      requests::refuse("session.caller", text(moving.caller.size(), " bytes"),
                       text("1..", kMostCallerBytes, " bytes"));
    }
    const std::vector<sessions::PageHash> hashes =
        requests::checked_hashes("session.prefix_hashes", moving.prefix_hashes);
    const sessions::ExportedSession exported = sessions::read_exported(decoded.chunk.data);
    requests::kv_models(exported.spec, core_.context());
    const identity::Bounds bounds = core_.callers.bounds_of(moving.caller);
    coming_ = std::make_shared<SessionImport>(
        core_, call_,
        core_.kv.import_session(exported, {exported.max_tokens, exported.reserved_tokens},
                                lease_of(moving.lease),
                                {moving.caller, bounds.sessions, bounds.session_bytes}, hashes),
        [reply = reply_](Status status, const sessions::SessionState& session) {
          Delivery delivery{std::move(status), {}};
          if (delivery.status.ok()) {
            delivery.messages.push_back(
                OutMessage::of(wire::encode_session_state(wire_state(session))));
          }
          reply->deliver(std::move(delivery));
        });
    pace_.begin(Clock::now());
  }

  Core& core_;
  const std::shared_ptr<grpc::Call> call_;
  const std::shared_ptr<Reply> reply_;
  Pace pace_;
  std::shared_ptr<SessionImport> coming_;  // once its first chunk is there
  bool all_there_ = false, over_ = false;
};

}  // namespace

std::unique_ptr<grpc::CallHandler> move_session_handler(Core& core,
                                                        std::shared_ptr<grpc::Call> call) {
  return std::make_unique<MoveSessionHandler>(core, std::move(call));
}

}  // namespace attnserve::services
