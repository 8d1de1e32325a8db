// The one Connection there is: gRPC on nghttp2. Bytes and wishes come in by connection.cc, calls
// are opened, fed, answered and ended in connection_calls.cc, time and manners are
// connection_timers.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "grpc/body_turns.h"
#include "grpc/connection.h"
#include "grpc/headers.h"
#include "grpc/mailbox.h"
#include "grpc/manners.h"
#include "grpc/output_queue.h"
#include "grpc/session.h"
#include "grpc/stream.h"

namespace attnserve::grpc {

class Http2Connection final : public Connection, private SessionEvents, private MailReader {
 public:
  Http2Connection(Service& service, ByteBudget& budget, Waker& waker,
                  const ConnectionOptions& options, std::uint64_t number, std::string peer,
                  TimePoint now);
  ~Http2Connection() override;

  void set_certificate(std::vector<std::string> names, std::function<bool()> trusted) override {
    if (names.empty()) return;
    certificate_ = std::make_shared<const Names>(std::move(names));
    trusted_ = std::move(trusted);
  }
  void receive(ByteSpan bytes, TimePoint now) override;
  std::size_t output(std::span<iovec> into) override;
  void written(std::size_t size, TimePoint now) override;
  void take_mail(TimePoint now) override;
  TimePoint next_timer() const override;
  void on_timer(TimePoint now) override;
  void drain(TimePoint now) override;
  void lost() override;
  bool wants_read() const override;
  bool finished() const override;
  std::size_t open_calls() const override { return calls_.size(); }
  std::uint64_t number() const override { return number_; }

 private:
  using StreamRef = std::shared_ptr<Stream>;
  using Names = std::vector<std::string>;

  // connection.cc. Every entry does its work within `enter`, so that calls may be used directly
  // meanwhile and what follows from the work is done before it returns.
  template <class Work>
  void enter(TimePoint now, Work work) noexcept;
  void settle();
  void serialize(std::size_t most_parts);
  void reach_marks();
  void took(const OutputQueue::Mark& mark);
  void carry_out(Mail mail) override;
  void wake() override { waker_.wake(*this); }
  void cut() noexcept;  // nothing more is said or heard
  // Says why, and ends; calls under way are cancelled.
  void condemn(std::uint32_t error_code, std::string_view why);

  // connection_calls.cc
  void on_headers_begin() override;
  bool on_header(std::string_view name, std::string_view value) override;
  void on_headers_end() override;
  void on_request(std::int32_t stream_id) override;
  void on_data(Stream& stream, ByteSpan bytes) override;
  void on_half_close(Stream& stream) override;
  void on_closed(Stream& stream) override;
  Offer on_data_wanted(Stream& stream, std::size_t most) override;
  bool on_data_frame(Stream& stream, ByteSpan frame_header, std::size_t size) override;
  void on_headers_sent(Stream& stream, bool end) override;

  void admit(const StreamRef& stream);
  void refuse(Stream& stream, const Refusal& refusal);
  void narrow();
  void widen();
  void ask_for_turn(Stream& stream);
  void give_turns();
  bool held(const Stream& stream) const { return stream.pauses > 0 || choked_; }
  bool deliverable(const Stream& stream) const;
  void deliver(Stream& stream, ByteSpan fresh);
  void deliver_or_throw(Stream& stream, ByteSpan fresh);
  void release_resumed();
  void give_back_withheld(Stream& stream);
  template <class Event>
  void tell(Stream& stream, Event event);
  void tell_all_sent(Stream& stream);
  void tell_due(Stream& stream);
  void push(Stream& stream, OutMessage message);
  void finish(Stream& stream, Status status);
  void pause(Stream& stream);
  void resume(Stream& stream);
  void fail(Stream& stream, Status status);  // the transport answers; the handler hears the code
  void submit_end(Stream& stream);
  void drop_answer(Stream& stream);
  void end_call(Stream& stream, Code reason);  // `stream` may be gone afterwards
  void end_all();                              // with kCancelled; allocates nothing once dead
  void forget_if_done(Stream& stream);
  void choke();
  void unchoke();

  // connection_timers.cc
  void on_settings() override;
  void on_settings_acknowledged() override;
  void on_ping(bool is_answer, const PingData& data) override;
  void on_reset_received(Stream* stream) override;
  void on_reset_sent(std::uint32_t error_code) override;
  void nuisance();
  void begin_drain();
  void end_drain();
  void check_connection();
  void check_keepalive();
  void check_calls();
  void check_call(Stream& stream);
  void recheck();
  TimePoint greeting_due() const;
  TimePoint idle_due() const;
  TimePoint age_due() const;
  TimePoint drain_due() const;
  TimePoint keepalive_due() const;
  TimePoint write_due() const;
  TimePoint linger_due() const;
  TimePoint recheck_due() const;
  TimePoint call_due(const Stream& stream) const;
  TimePoint body_due(const Stream& stream) const;
  TimePoint handler_due(const Stream& stream) const;
  TimePoint stall_due(const Stream& stream) const;
  void schedule(TimePoint due) { calls_due_ = std::min(calls_due_, due); }

  // After which it is looked again who calls.
  static constexpr Duration kRecheck = std::chrono::seconds(1);

  enum class Drain : std::uint8_t { kNot, kNoticed, kGoneAway };

  Service& service_;
  ByteBudget& budget_;
  Waker& waker_;
  const ConnectionOptions options_;
  const std::uint64_t number_;
  const std::string peer_;
  std::shared_ptr<const Names> certificate_;
  std::function<bool()> trusted_;  // whether it would be taken now

  const std::shared_ptr<Mailbox> mailbox_;
  OutputQueue output_;
  RequestHeaders headers_;  // those that are being decoded; header blocks are never interleaved
  Manners manners_;
  std::vector<StreamRef>
      calls_;  // not ended, or their streams not closed; Stream::index is into it
  std::vector<StreamRef> resumed_;  // to be fed what was kept while they were paused
  std::size_t unsent_ = 0;          // bytes of answers that the socket has not taken
  bool choked_ = false;             // too many: no message is delivered meanwhile
  bool events_ = false;             // the service has heard something since its after_events
  bool closing_ = false;            // a last GOAWAY is on its way; what comes is discarded
  bool dead_ = false;
  std::size_t early_ends_ = 0;  // calls ended before their callers had: resets may cross ours
  std::size_t begun_ = 0;       // calls that have not ended, of whose bodies some has come
  bool narrow_ = false;         // bodies are sent once their calls are admitted, see `narrow`
  BodyTurns turns_;             // and by turns

  TimePoint now_;
  const TimePoint created_;
  bool greeted_ = false;              // preface and SETTINGS have come
  TimePoint headers_since_ = kNever;  // of the block that is being decoded
  TimePoint idle_since_;              // when the last call ended
  TimePoint last_received_;
  TimePoint last_written_;             // or when there was something to write again
  TimePoint keepalive_sent_ = kNever;  // and nothing has come since
  TimePoint choked_since_{};
  TimePoint narrow_since_{};  // or the last refusal since
  TimePoint closing_since_{};
  Drain drain_ = Drain::kNot;
  TimePoint drain_since_{};
  TimePoint aged_since_ = kNever;
  TimePoint rechecked_;           // whether the callers of open calls are still who they were
  TimePoint calls_due_ = kNever;  // no call needs looking at before; may be too early

  Session session_;  // last: it names this object's other parts from the first on
};

}  // namespace attnserve::grpc
