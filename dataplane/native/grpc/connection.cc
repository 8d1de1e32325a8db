#include "grpc/connection.h"

#include <algorithm>
#include <utility>

#include "grpc/http2_connection.h"

namespace attnserve::grpc {

namespace {

// Serialized ahead of the socket: enough for one write, little for a PING to wait behind.
constexpr std::size_t kMostAhead = 1U << 20;
// Frames that wait for a socket which takes nothing; acknowledgements are bounded by nghttp2
// itself.
constexpr std::size_t kMostQueuedFrames = 4096;

}  // namespace

std::unique_ptr<Connection> Connection::create(Service& service, ByteBudget& budget, Waker& waker,
                                               const ConnectionOptions& options,
                                               std::uint64_t number, std::string peer,
                                               TimePoint now) {
  return std::make_unique<Http2Connection>(service, budget, waker, options, number, std::move(peer),
                                           now);
}

Http2Connection::Http2Connection(Service& service, ByteBudget& budget, Waker& waker,
                                 const ConnectionOptions& options, std::uint64_t number,
                                 std::string peer, TimePoint now)
    : service_(service),
      budget_(budget),
      waker_(waker),
      options_(options),
      number_(number),
      peer_(std::move(peer)),
      mailbox_(std::make_shared<Mailbox>(static_cast<MailReader&>(*this))),
      headers_(options.max_header_bytes),
      manners_(options, now),
      now_(now),
      created_(now),
      idle_since_(now),
      last_received_(now),
      last_written_(now),
      rechecked_(now),
      session_(*this, options_) {
  if (service_.begins_unknown()) narrow();
}

Http2Connection::~Http2Connection() {
  lost();
  mailbox_->close();
}

// Memory may be short anywhere within: then this connection is at its end and no other.
template <class Work>
void Http2Connection::enter(TimePoint now, Work work) noexcept {
  now_ = now;
  mailbox_->enter();
  try {
    work();
    settle();
  } catch (...) {
    cut();
  }
  mailbox_->leave();
}

void Http2Connection::settle() {
  do {
    mailbox_->drain();
    release_resumed();
    if (std::exchange(events_, false)) service_.after_events();
  } while (mailbox_->waiting() || !resumed_.empty() || events_);
  if (narrow_ && !dead_) give_turns();
  if (dead_ || closing_ || session_.wants_read() || session_.wants_write()) return;
  // nghttp2 has said goodbye, to a peer that broke the protocol or to one that went away.
  closing_ = true;
  closing_since_ = now_;
  end_all();
}

void Http2Connection::receive(ByteSpan bytes, TimePoint now) {
  if (dead_ || closing_) return;
  enter(now, [&] {
    last_received_ = now;
    keepalive_sent_ = kNever;
    if (!session_.receive(bytes)) cut();
  });
}

std::size_t Http2Connection::output(std::span<iovec> into) {
  if (dead_) return 0;
  const bool was_empty = output_.empty();
  enter(now_, [&] { serialize(into.size()); });
  // What was asked for while that was done.
  if (output_.empty() && session_.wants_write()) enter(now_, [&] { serialize(into.size()); });
  if (dead_) return 0;
  if (was_empty) last_written_ = now_;
  return output_.fill(into);
}

void Http2Connection::serialize(std::size_t most_parts) {
  while (!dead_ && output_.size() < kMostAhead && output_.parts() < most_parts) {
    ByteSpan frame;
    bool more = false;
    if (!session_.send(frame, more)) return cut();
    if (!more) break;
    output_.copy(frame);
  }
  if (output_.empty()) reach_marks();  // of what had been written before its mark was made
}

bool Http2Connection::on_data_frame(Stream& stream, ByteSpan frame_header, std::size_t size) {
  output_.copy(frame_header);
  stream.answer.move_to(output_, size);
  output_.mark({calls_[stream.index], size, false, {}});
  manners_.answered();
  return output_.size() < kMostAhead;
}

void Http2Connection::written(std::size_t size, TimePoint now) {
  if (dead_) return;
  enter(now, [&] {
    if (size > 0) last_written_ = now;
    output_.written(size);
    reach_marks();
  });
}

void Http2Connection::reach_marks() {
  OutputQueue::Mark mark;
  while (!dead_ && output_.reached(mark)) {
    if (mark.stream) took(mark);
    mark = {};
  }
}

void Http2Connection::took(const OutputQueue::Mark& mark) {
  Stream& stream = *mark.stream;
  unsent_ -= mark.size;
  stream.queued -= mark.size;
  stream.sent(mark.size);
  stream.progress = now_;
  if (mark.end) {
    end_call(stream, Code::kOk);
  } else if (stream.handler && stream.unsent() == 0) {
    tell_all_sent(stream);
  }
  if (choked_ && unsent_ <= options_.max_unsent_bytes / 2) unchoke();
}

void Http2Connection::take_mail(TimePoint now) {
  enter(now, [] {});
}

void Http2Connection::carry_out(Mail mail) {
  Stream& stream = *mail.stream;
  if (stream.ended()) return;
  switch (mail.wish.index()) {
    case 0:
      return push(stream, std::get<OutMessage>(std::move(mail.wish)));
    case 1:
      return finish(stream, std::get<Status>(std::move(mail.wish)));
    case 2:
      return pause(stream);
    default:
      return resume(stream);
  }
}

void Http2Connection::on_timer(TimePoint now) {
  if (dead_) return;
  enter(now, [&] {
    check_connection();
    if (!dead_ && now >= calls_due_) check_calls();
  });
}

void Http2Connection::drain(TimePoint now) {
  if (dead_ || closing_) return;
  enter(now, [&] { begin_drain(); });
}

void Http2Connection::lost() {
  enter(now_, [&] { cut(); });
}

void Http2Connection::cut() noexcept {
  dead_ = true;
  end_all();
}

void Http2Connection::condemn(std::uint32_t error_code, std::string_view why) {
  if (dead_ || closing_) return;
  closing_ = true;
  closing_since_ = now_;
  session_.submit_goaway(error_code, why);
  end_all();
}

// While closing, input is read and discarded: a socket closed with unread input may lose the
// GOAWAY.
bool Http2Connection::wants_read() const {
  if (output_.empty() || closing_) return true;
  return !choked_ && session_.queued_frames() < kMostQueuedFrames;
}

bool Http2Connection::finished() const {
  if (dead_) return true;
  if (!output_.empty() || session_.wants_write()) return false;
  return closing_ || !session_.wants_read() || (drain_ == Drain::kGoneAway && calls_.empty());
}

}  // namespace attnserve::grpc
