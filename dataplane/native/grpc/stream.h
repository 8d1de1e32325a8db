// One call as its connection keeps it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "grpc/answer.h"
#include "grpc/body.h"
#include "grpc/call.h"
#include "grpc/headers.h"
#include "grpc/mailbox.h"

namespace attnserve::grpc {

// The Call that services hold, which may outlive its connection, and what the connection knows of
// it. A call has ended once its handler has heard so; its HTTP/2 stream is closed at another time.
class Stream final : public Call, public std::enable_shared_from_this<Stream> {
 public:
  Stream(std::shared_ptr<Mailbox> mailbox, std::int32_t stream_id, Encoding body_encoding,
         CallInfo call_info)
      : id(stream_id),
        encoding(body_encoding),
        mailbox_(std::move(mailbox)),
        info_(std::move(call_info)) {}

  // Any thread.
  const CallInfo& info() const override { return info_; }
  void identify(std::shared_ptr<identity::Caller> caller, const std::string& name,
                std::shared_ptr<const identity::Credential> credential) override {
    info_.caller = std::move(caller);
    info_.credential = std::move(credential);
    info_.authorization.clear();
    if (!name.empty()) info_.peer.append("@").append(name);
  }
  void record(std::shared_ptr<tracing::Recording> recording) override {
    info_.recording = std::move(recording);
  }
  void send(OutMessage message) override;
  void finish(Status status) override;
  void pause() override { post(PauseWish{}); }
  void resume() override { post(ResumeWish{}); }
  std::size_t unsent() const override;
  bool ended() const override { return ended_.load(std::memory_order_acquire); }

  // All that follows belongs to the connection and is used on its thread alone.
  void set_ended() { ended_.store(true, std::memory_order_release); }
  // Time in which the caller could not send does not count against it.
  void forgive(Duration held) {
    if (body) body->forgive(held);
    if (handler) handler->on_held(held);
  }
  void sent(std::size_t size) { unsent_.fetch_sub(size, std::memory_order_relaxed); }

  const std::int32_t id;
  const Encoding encoding;
  std::size_t index = 0;  // among the connection's calls
  bool closed = false;    // nghttp2 has forgotten the stream

  // Incoming. No handler: refused or ended, and what still comes of the body is discarded.
  std::unique_ptr<CallHandler> handler;
  std::optional<Body> body;
  std::shared_ptr<const void> kept;  // for the service, until the call has ended
  bool begun = false;                // some of its body has come
  bool narrow = false;          // more of it than a little may not be sent, see Http2Connection
  bool waits_for_turn = false;  // to send the rest, see BodyTurns
  TimePoint turn_since{};       // it has waited, or had it
  std::size_t withheld = 0;     // bytes by which the stream's window was not opened again
  std::uint32_t pauses = 0;
  TimePoint paused_since{};
  bool in_handler = false;   // no other event meanwhile
  bool half_closed = false;  // by the caller
  bool half_close_told = false;

  // Outgoing, in the order in which these become true.
  Answer answer;
  std::size_t queued = 0;  // bytes of messages that the socket has not taken
  TimePoint progress{};    // when it last took some, or there were some again
  bool headers_submitted = false;
  bool finishing = false;  // `trailers` is what the call is to end with
  bool trailers_submitted = false;
  bool trailers_out = false;  // serialized; written soon
  Status trailers;

 private:
  template <class Wish>
  void post(Wish wish) {
    if (!ended()) mailbox_->deliver({shared_from_this(), std::move(wish)});
  }

  const std::shared_ptr<Mailbox> mailbox_;
  CallInfo info_;  // as it is once the call has been accepted
  std::atomic<std::size_t> unsent_{0};
  std::atomic<bool> ended_{false};
};

}  // namespace attnserve::grpc
