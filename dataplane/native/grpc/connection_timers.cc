#include <algorithm>
#include <utility>

#include "grpc/http2_connection.h"

namespace attnserve::grpc {

namespace {

constexpr PingData kDrainPing{'d', 'r', 'a', 'i', 'n'};
constexpr PingData kKeepalivePing{'a', 'l', 'i', 'v', 'e'};

// Calls that a caller sent before it could know of the GOAWAY arrive within this, or it does not
// answer pings.
constexpr Duration kDrainNotice = std::chrono::seconds(1);
// How long a last GOAWAY may take to be written.
constexpr Duration kLinger = std::chrono::seconds(1);
// Streams reset sooner are what a rapid reset is made of; a call that somebody gave up is older.
constexpr Duration kRapid = std::chrono::milliseconds(100);

TimePoint after(TimePoint time, Duration duration) {
  return duration < kNever - time ? time + duration : kNever;
}

// 0: never.
TimePoint after_unless_zero(TimePoint time, Duration duration) {
  return duration > Duration::zero() ? after(time, duration) : kNever;
}

// The age at which a connection is to go: up to a tenth sooner than asked for, by its number, so
// that connections made together do not all come back together.
Duration spread(Duration age, std::uint64_t number) {
  const std::uint64_t hash = number * 0x9E3779B97F4A7C15U >> 32U;
  const double sooner = 0.1 * static_cast<double>(hash) / 4294967296.0;
  return std::chrono::duration_cast<Duration>(age * (1.0 - sooner));
}

}  // namespace

// ---- Manners

void Http2Connection::on_settings() {
  if (!std::exchange(greeted_, true)) return;
  nuisance();
}

void Http2Connection::on_ping(bool is_answer, const PingData& data) {
  if (is_answer) {
    if (data == kDrainPing && drain_ == Drain::kNoticed) end_drain();
  } else if (!manners_.ping(now_)) {
    condemn(NGHTTP2_ENHANCE_YOUR_CALM, "too_many_pings");
  }
}

void Http2Connection::on_reset_received(Stream* stream) {
  // gRPC's callers reset a stream whose trailers came before they had ended it.
  if (stream == nullptr && early_ends_ > 0) {
    --early_ends_;
    return;
  }
  // One that was refused has cost next to nothing, and its caller may not know of it yet.
  if (stream != nullptr && stream->ended()) return;
  if (stream == nullptr || now_ - stream->info().arrived < kRapid) nuisance();
}

// What a caller makes this side reset costs as much as what it resets itself.
void Http2Connection::on_reset_sent(std::uint32_t error_code) {
  if (error_code != NGHTTP2_NO_ERROR && error_code != NGHTTP2_REFUSED_STREAM) nuisance();
}

void Http2Connection::nuisance() {
  if (!manners_.nuisance(now_)) condemn(NGHTTP2_ENHANCE_YOUR_CALM, "too_many_resets");
}

// ---- Drain: first a GOAWAY that refuses nothing yet, then, when every call that was on its way
// must have arrived, one that names the last.

void Http2Connection::begin_drain() {
  if (drain_ != Drain::kNot) return;
  drain_ = Drain::kNoticed;
  drain_since_ = now_;
  session_.submit_shutdown_notice();
  session_.submit_ping(kDrainPing);
}

void Http2Connection::end_drain() {
  drain_ = Drain::kGoneAway;
  session_.submit_goaway(NGHTTP2_NO_ERROR, {});
}

// ---- The connection's times

TimePoint Http2Connection::next_timer() const {
  if (dead_) return kNever;
  return std::min({greeting_due(), idle_due(), age_due(), drain_due(), keepalive_due(), write_due(),
                   linger_due(), recheck_due(), calls_due_});
}

TimePoint Http2Connection::greeting_due() const {
  return after(greeted_ ? headers_since_ : created_, options_.header_timeout);
}

TimePoint Http2Connection::idle_due() const {
  const bool idle = greeted_ && calls_.empty() && drain_ == Drain::kNot && !closing_;
  return idle ? after_unless_zero(idle_since_, options_.idle_timeout) : kNever;
}

TimePoint Http2Connection::age_due() const {
  if (closing_) return kNever;
  if (aged_since_ != kNever) return after(aged_since_, options_.max_age_grace);
  return after_unless_zero(created_, spread(options_.max_age, number_));
}

TimePoint Http2Connection::drain_due() const {
  return drain_ == Drain::kNoticed && !closing_ ? after(drain_since_, kDrainNotice) : kNever;
}

TimePoint Http2Connection::keepalive_due() const {
  if (closing_) return kNever;
  if (keepalive_sent_ != kNever) return after(keepalive_sent_, options_.keepalive_timeout);
  return after_unless_zero(last_received_, options_.keepalive_interval);
}

TimePoint Http2Connection::write_due() const {
  return output_.empty() ? kNever : after(last_written_, options_.write_timeout);
}

TimePoint Http2Connection::recheck_due() const {
  const bool wanted = !calls_.empty() && !closing_ && service_.rechecks();
  return wanted ? after(rechecked_, kRecheck) : kNever;
}

TimePoint Http2Connection::linger_due() const {
  return closing_ ? after(closing_since_, kLinger) : kNever;
}

void Http2Connection::check_connection() {
  if (now_ >= greeting_due() || now_ >= write_due() || now_ >= linger_due()) return cut();
  if (now_ >= idle_due()) begin_drain();
  if (now_ >= age_due()) {
    if (aged_since_ != kNever) return condemn(NGHTTP2_NO_ERROR, "max_age");
    aged_since_ = now_;
    begin_drain();
  }
  if (now_ >= drain_due()) end_drain();
  if (now_ >= keepalive_due()) check_keepalive();
  if (now_ >= recheck_due()) recheck();
}

void Http2Connection::check_keepalive() {
  if (keepalive_sent_ != kNever) return cut();
  keepalive_sent_ = now_;
  session_.submit_ping(kKeepalivePing);
}

// ---- The calls' times

TimePoint Http2Connection::body_due(const Stream& stream) const {
  if (!stream.body || held(stream) || stream.waits_for_turn) return kNever;
  return stream.body->due();
}

TimePoint Http2Connection::handler_due(const Stream& stream) const {
  const bool kept_waiting = held(stream) || stream.waits_for_turn;
  return stream.handler && !stream.finishing && !kept_waiting ? stream.handler->due() : kNever;
}

TimePoint Http2Connection::stall_due(const Stream& stream) const {
  return stream.queued > 0 ? after(stream.progress, options_.write_timeout) : kNever;
}

TimePoint Http2Connection::call_due(const Stream& stream) const {
  if (stream.ended() || stream.trailers_out) return kNever;
  const TimePoint deadline = stream.trailers_submitted ? kNever : stream.info().deadline;
  return std::min({deadline, body_due(stream), handler_due(stream), stall_due(stream)});
}

void Http2Connection::check_calls() {
  calls_due_ = kNever;
  const std::vector<StreamRef> calls = calls_;
  for (const StreamRef& stream : calls) {
    if (now_ >= call_due(*stream)) check_call(*stream);
    schedule(call_due(*stream));
  }
}

// A certificate that would not be taken any more is forgotten, and its caller asked to connect
// anew.
void Http2Connection::recheck() {
  rechecked_ = now_;
  const bool trusted = !certificate_ || trusted_();
  if (!trusted) {
    certificate_.reset();
    begin_drain();
  }
  const std::vector<StreamRef> calls = calls_;
  for (const StreamRef& stream : calls) {
    if (!stream->handler || stream->trailers_submitted) continue;
    if (auto refused = service_.recheck(stream->info(), trusted)) fail(*stream, *refused);
  }
}

void Http2Connection::check_call(Stream& stream) {
  if (!stream.trailers_submitted && now_ >= stream.info().deadline) {
    return fail(stream, {Code::kDeadlineExceeded, "the deadline passed before the call ended", {}});
  }
  if (now_ >= body_due(stream)) return fail(stream, stream.body->late());
  if (now_ >= handler_due(stream)) return tell_due(stream);
  if (now_ < stall_due(stream)) return;
  if (!session_.blocked_by_peer(stream)) {
    // Others' answers are before it. Looked at again soon.
    stream.progress += options_.write_timeout / 4;
    return;
  }
  session_.reset(stream, NGHTTP2_CANCEL);
  end_call(stream, Code::kCancelled);
}

}  // namespace attnserve::grpc
