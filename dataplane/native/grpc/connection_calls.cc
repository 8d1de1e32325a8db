#include <algorithm>
#include <exception>
#include <utility>
#include <variant>

#include "base/text.h"
#include "grpc/http2_connection.h"

namespace attnserve::grpc {

namespace {

constexpr std::uint32_t kEnhanceYourCalm = NGHTTP2_ENHANCE_YOUR_CALM;

// What callers may send ahead of being admitted, while some are refused; small calls fit.
constexpr std::uint32_t kNarrowWindow = 1U << 10;
constexpr Duration kNarrowFor = std::chrono::seconds(1);  // after the last reason to be narrow
constexpr std::size_t kManyCalls = 16;                    // whose bodies have begun to come
// When it is looked again whether bodies are wanted, if nothing else happens here.
constexpr Duration kNextLook = std::chrono::milliseconds(2);

// Refusals that others of the same caller are likely to follow.
bool is_of_caller(Code code) {
  return code == Code::kResourceExhausted || code == Code::kUnauthenticated ||
         code == Code::kPermissionDenied;
}

}  // namespace

// ---- Requests

void Http2Connection::on_headers_begin() {
  headers_.clear();
  headers_since_ = now_;
}

bool Http2Connection::on_header(std::string_view name, std::string_view value) {
  if (headers_.add(name, value)) return true;
  condemn(kEnhanceYourCalm, "header_list_too_large");
  return false;
}

void Http2Connection::on_headers_end() { headers_since_ = kNever; }

void Http2Connection::on_request(std::int32_t stream_id) {
  if (dead_ || closing_) return;
  if (now_ - rechecked_ >= kRecheck && certificate_ && service_.rechecks()) recheck();
  const std::optional<Refusal> refusal = headers_.refusal();
  CallInfo info = headers_.take_info(now_);
  info.peer = peer_;
  info.connection = number_;
  info.certificate = certificate_;
  auto stream = std::make_shared<Stream>(mailbox_, stream_id, headers_.encoding(), std::move(info));
  stream->index = calls_.size();
  calls_.push_back(stream);
  session_.attach(*stream);
  if (refusal) return refuse(*stream, *refusal);
  if (stream->info().deadline <= now_) {
    return refuse(*stream, {200, {Code::kDeadlineExceeded, "the deadline had passed", {}}});
  }
  schedule(stream->info().deadline);
  if (begun_ > kManyCalls) {
    narrow();
  } else if (narrow_ && now_ - narrow_since_ > kNarrowFor) {
    widen();
  }
  admit(stream);
}

void Http2Connection::admit(const StreamRef& stream) {
  std::variant<Reception, Status> verdict;
  events_ = true;
  try {
    verdict = service_.accept(stream);
  } catch (...) {
    verdict = status_of(std::current_exception());
  }
  if (Status* status = std::get_if<Status>(&verdict)) {
    if (is_of_caller(status->code)) narrow();
    return refuse(*stream, {200, std::move(*status)});
  }
  Reception& reception = std::get<Reception>(verdict);
  if (!reception.is_known) narrow();
  stream->narrow = narrow_;
  stream->handler = std::move(reception.handler);
  stream->kept = std::move(reception.kept);
  stream->body.emplace(reception.budget != nullptr ? *reception.budget : budget_,
                       reception.max_message_bytes, stream->encoding, options_.body_pace);
}

// What still comes of its body is discarded: its window is not opened again, and once the trailers
// are out the stream is reset.
void Http2Connection::refuse(Stream& stream, const Refusal& refusal) {
  service_.count(stream.info().path, refusal.status.code);
  if (refusal.http_status != 200) {
    stream.headers_submitted = stream.trailers_submitted = true;
    session_.submit_headers(stream, AnswerFields::http(refusal.http_status).fields(), false);
  } else if (!std::exchange(stream.finishing, true)) {
    stream.trailers = refusal.status;
  }
  drop_answer(stream);
  submit_end(stream);
  end_call(stream, refusal.status.code);
}

// A body that is sent ahead delays the headers behind it, in the caller's queue as in the socket's,
// costs both sides as much for a call that is refused as for one that is answered, and takes memory
// for as long as it waits to be computed. So, while calls are refused or many wait, bodies come
// once their calls are admitted, a few at a time, as fast as they are used: a round trip more for
// those. Nobody pays it otherwise.
void Http2Connection::narrow() {
  narrow_since_ = now_;
  if (std::exchange(narrow_, true)) return;
  session_.set_initial_window(std::min(kNarrowWindow, options_.stream_window));
}

void Http2Connection::widen() {
  narrow_ = false;
  for (const StreamRef& stream : calls_) {
    stream->narrow = false;
    if (stream->waits_for_turn && !held(*stream)) give_back_withheld(*stream);
  }
  turns_.end(now_);
  session_.set_initial_window(options_.stream_window);
}

void Http2Connection::give_turns() {
  while (turns_.anyone_waits() && service_.wants_bodies()) {
    const StreamRef stream = turns_.next(now_);
    if (!stream) return schedule(turns_.due());
    session_.open_window(*stream, options_.stream_window);
    if (!held(*stream)) give_back_withheld(*stream);
  }
  if (turns_.anyone_waits()) schedule(now_ + kNextLook);
}

// What was admitted before has lost the difference.
void Http2Connection::on_settings_acknowledged() {
  if (!narrow_) return;
  for (const StreamRef& stream : calls_) {
    if (stream->handler && !stream->narrow && !stream->waits_for_turn)
      session_.open_window(*stream, options_.stream_window);
  }
}

// ---- Bodies

void Http2Connection::on_data(Stream& stream, ByteSpan bytes) {
  session_.consume_connection(bytes.size());
  if (!stream.handler || stream.finishing) return;
  if (!std::exchange(stream.begun, true)) ++begun_;
  deliver(stream, bytes);
  if (!stream.handler) return;
  ask_for_turn(stream);
  if (held(stream) || stream.waits_for_turn) {
    stream.withheld += bytes.size();
  } else {
    session_.consume_stream(stream, bytes.size());
  }
}

// Once it is known that the rest of its body is wanted: not while nothing of it is taken.
void Http2Connection::ask_for_turn(Stream& stream) {
  if (!stream.narrow || held(stream) || !stream.body || !stream.body->under_way()) return;
  stream.narrow = false;
  turns_.ask(calls_[stream.index], now_);
}

void Http2Connection::on_half_close(Stream& stream) {
  stream.half_closed = true;
  if (stream.handler) deliver(stream, {});
}

bool Http2Connection::deliverable(const Stream& stream) const {
  return stream.handler && !stream.finishing && !stream.in_handler && !held(stream);
}

void Http2Connection::deliver(Stream& stream, ByteSpan fresh) {
  try {
    deliver_or_throw(stream, fresh);
  } catch (...) {
    fail(stream, status_of(std::current_exception()));
  }
}

void Http2Connection::deliver_or_throw(Stream& stream, ByteSpan fresh) {
  while (deliverable(stream)) {
    std::optional<Bytes> message = stream.body->next(fresh, now_);
    if (!message) break;
    tell(stream, [&](CallHandler& handler) { handler.on_message(std::move(*message)); });
  }
  if (!stream.handler || stream.finishing) return;
  if (!fresh.empty()) stream.body->keep(fresh, now_);
  if (stream.half_closed && !stream.half_close_told && deliverable(stream)) {
    if (stream.body->under_way()) {
      throw RequestError(Code::kInternal, "message: the stream ended before it");
    }
    stream.half_close_told = true;
    tell(stream, [](CallHandler& handler) { handler.on_half_close(); });
  }
  schedule(std::min(body_due(stream), handler_due(stream)));
}

// After a pause: what was kept is delivered, and the caller may send on.
void Http2Connection::release_resumed() {
  const std::vector<StreamRef> resumed = std::exchange(resumed_, {});
  for (const StreamRef& stream : resumed) {
    if (!stream->handler || stream->finishing || held(*stream)) continue;
    if (!stream->waits_for_turn) give_back_withheld(*stream);
    deliver(*stream, {});
    if (stream->handler) ask_for_turn(*stream);
  }
}

void Http2Connection::give_back_withheld(Stream& stream) {
  if (stream.withheld > 0) session_.consume_stream(stream, std::exchange(stream.withheld, 0));
}

void Http2Connection::pause(Stream& stream) {
  if (stream.pauses++ == 0) stream.paused_since = now_;
}

void Http2Connection::resume(Stream& stream) {
  if (stream.pauses == 0 || --stream.pauses > 0) return;
  stream.forgive(now_ - stream.paused_since);
  resumed_.push_back(calls_[stream.index]);
}

void Http2Connection::choke() {
  if (choked_) return;
  choked_ = true;
  choked_since_ = now_;
}

void Http2Connection::unchoke() {
  choked_ = false;
  for (const StreamRef& stream : calls_) {
    stream->forgive(now_ - choked_since_);
    resumed_.push_back(stream);
  }
}

// What a handler throws ends its call as if it had finished it so.
template <class Event>
void Http2Connection::tell(Stream& stream, Event event) {
  events_ = true;
  stream.in_handler = true;
  try {
    event(*stream.handler);
    stream.in_handler = false;
  } catch (...) {
    stream.in_handler = false;
    finish(stream, status_of(std::current_exception()));
  }
}

void Http2Connection::tell_all_sent(Stream& stream) {
  tell(stream, [](CallHandler& handler) { handler.on_all_sent(); });
}

void Http2Connection::tell_due(Stream& stream) {
  tell(stream, [&](CallHandler& handler) { handler.on_due(now_); });
}

// ---- Answers

void Http2Connection::push(Stream& stream, OutMessage message) {
  if (stream.finishing || stream.closed) return;
  const std::size_t size = kPrefixBytes + message.size();
  if (!stream.headers_submitted) {
    stream.headers_submitted = true;
    session_.submit_headers(stream, AnswerFields::initial().fields(), true);
  } else if (stream.answer.waiting() == 0) {
    session_.resume(stream);
  }
  stream.answer.push(std::move(message));
  if (stream.queued == 0) stream.progress = now_;
  stream.queued += size;
  schedule(stall_due(stream));
  unsent_ += size;
  if (unsent_ > options_.max_unsent_bytes) choke();
}

void Http2Connection::finish(Stream& stream, Status status) {
  if (stream.ended() || stream.finishing) return;
  stream.finishing = true;
  stream.trailers = std::move(status);
  stream.body.reset();
  // Otherwise they go with the last DATA frame.
  if (stream.answer.waiting() == 0) submit_end(stream);
}

void Http2Connection::fail(Stream& stream, Status status) {
  if (stream.ended() || stream.trailers_submitted) return;
  const Code code = status.code;
  drop_answer(stream);
  stream.finishing = true;
  stream.trailers = std::move(status);
  submit_end(stream);
  end_call(stream, code);
}

void Http2Connection::submit_end(Stream& stream) {
  if (std::exchange(stream.trailers_submitted, true)) return;
  if (std::exchange(stream.headers_submitted, true)) {
    session_.submit_trailers(stream, AnswerFields::trailers(stream.trailers).fields());
  } else {
    session_.submit_headers(stream, AnswerFields::trailers_only(stream.trailers).fields(), false);
  }
}

SessionEvents::Offer Http2Connection::on_data_wanted(Stream& stream, std::size_t most) {
  const std::size_t waiting = stream.answer.waiting();
  const std::size_t size = std::min(most, waiting);
  if (size == 0) return {};
  const bool last = stream.finishing && size == waiting;
  if (last) submit_end(stream);
  return {size, last};
}

void Http2Connection::on_headers_sent(Stream& stream, bool end) {
  manners_.answered();
  if (!end) return;
  stream.trailers_out = true;
  output_.mark({calls_[stream.index], 0, true, {}});
  if (stream.half_closed) return;
  session_.reset(stream, NGHTTP2_NO_ERROR);
  ++early_ends_;
}

// ---- Ends

void Http2Connection::on_closed(Stream& stream) {
  stream.closed = true;
  if (stream.ended()) {
    forget_if_done(stream);
  } else if (!stream.trailers_out) {
    end_call(stream, Code::kCancelled);
  }
}

void Http2Connection::end_call(Stream& stream, Code reason) {
  if (stream.ended()) return;
  drop_answer(stream);
  stream.set_ended();
  if (stream.begun) --begun_;
  stream.body.reset();
  if (const std::unique_ptr<CallHandler> handler = std::move(stream.handler)) {
    events_ = true;
    try {
      handler->on_end(reason);
    } catch (...) {
      status_of(std::current_exception());  // logs what is nobody's answer any more
    }
  }
  stream.kept.reset();
  forget_if_done(stream);
}

void Http2Connection::drop_answer(Stream& stream) {
  const std::size_t waiting = stream.answer.waiting();
  if (dead_) {
    stream.answer = {};
  } else {
    stream.answer.drop(output_);
  }
  unsent_ -= waiting;
  stream.queued -= waiting;
}

void Http2Connection::end_all() {
  // From the end, for what is forgotten is replaced by the last.
  for (std::size_t i = calls_.size(); i-- > 0;) {
    if (i >= calls_.size()) continue;
    const StreamRef stream = calls_[i];
    end_call(*stream, Code::kCancelled);
  }
}

void Http2Connection::forget_if_done(Stream& stream) {
  if (!stream.closed || !stream.ended()) return;
  const std::size_t index = stream.index;
  calls_[index].swap(calls_.back());
  calls_[index]->index = index;
  calls_.pop_back();  // with the last reference, perhaps
  if (calls_.empty()) idle_since_ = now_;
}

}  // namespace attnserve::grpc
