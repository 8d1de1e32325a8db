#include "grpc/link.h"

#include <sys/epoll.h>

#include <array>
#include <chrono>
#include <utility>

namespace attnserve::grpc {
namespace {

constexpr std::size_t kPieces = 64;                        // for one call of the system
constexpr std::size_t kSendBytes = 4U << 20;               // before others have their turn
constexpr Duration kLingerTime = std::chrono::seconds(1);  // as long as a last answer may travel

}  // namespace

Link::Link(Arrival arrival, const ConnectionFactory& factory, Waker& waker, TimePoint now,
           TimePoint handshake_end)
    : place_(std::move(arrival.place)),
      transport_(std::move(arrival.transport)),
      factory_(factory),
      waker_(waker),
      peer_(std::move(arrival.peer)),
      number_(arrival.number),
      phase_end_(handshake_end) {
  if (transport_->established()) open(now);
}

Link::~Link() { abandon(); }

void Link::open(TimePoint now) {
  connection_ = factory_(waker_, number_, std::move(peer_), now);
  connection_->set_certificate(transport_->certificate_names(),
                               [this] { return transport_->peer_is_trusted(); });
  phase_ = Phase::kOpen;
}

void Link::note(std::uint32_t events) {
  if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) readable_ = true;
  if ((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) ended_ = true;
  if ((events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0) blocked_ = false;
}

bool Link::wants_read() const {
  return readable_ && !closed() && (!connection_ || connection_->wants_read());
}

void Link::receive(MutableByteSpan buffer, TimePoint now) {
  const ReadResult got = phase_ == Phase::kLingering ? read_from_socket(descriptor(), buffer)
                                                     : transport_->read(buffer);
  const bool over = got.state == ReadState::kEnd || got.state == ReadState::kBroken;
  readable_ = got.state == ReadState::kMore || (ended_ && got.size > 0);
  if (phase_ == Phase::kHandshake) {
    if (transport_->established()) {
      open(now);
    } else if (got.state == ReadState::kBroken) {
      linger(now);  // the alert that says why shall arrive
      return;
    }
  }
  if (connection_ && got.size > 0) connection_->receive(buffer.first(got.size), now);
  if (over) abandon();
}

Link::Sent Link::send(TimePoint now) {
  std::array<iovec, kPieces> pieces;
  std::size_t sent = 0;
  while (!closed() && !blocked_) {
    const std::size_t count =
        connection_ && transport_->established() ? connection_->output(pieces) : 0;
    if (count == 0 && !transport_->has_unsent()) break;
    if (sent >= kSendBytes) return {true, true};
    const WriteResult result = transport_->write({pieces.data(), count});
    if (result.size > 0 && connection_) connection_->written(result.size, now);
    sent += result.size;
    blocked_ = result.blocked;
    if (result.broken) abandon();
  }
  if (connection_ && connection_->finished()) {
    // One that is finished though the socket has not taken all has given up on a caller who reads
    // nothing: what waits in the kernel is for nobody.
    if (blocked_ && !transport_->has_unsent()) {
      abandon();
    } else {
      linger(now);
    }
  } else if (phase_ == Phase::kLingering) {
    end_output();
  }
  return {sent > 0, false};
}

// A socket that is closed with unread bytes in it takes back what it sent last: so it is only half
// closed, and read until the peer has closed its half.
void Link::linger(TimePoint now) {
  connection_.reset();
  phase_ = ended_ ? Phase::kClosed : Phase::kLingering;
  phase_end_ = now + kLingerTime;
  end_output();
}

void Link::end_output() {
  if (output_ended_ || blocked_) return;
  output_ended_ = true;
  transport_->end_output();
}

// A caller who is still reading the last answer is given more time.
bool Link::gets_on() {
  if (phase_ != Phase::kLingering) return false;
  const std::size_t before = std::exchange(unacknowledged_, transport_->unacknowledged());
  return unacknowledged_ > 0 && unacknowledged_ < before;
}

TimePoint Link::next_timer() const {
  if (closed()) return kNever;
  return connection_ ? connection_->next_timer() : phase_end_;
}

void Link::expire(TimePoint now) {
  if (next_timer() > now) return;
  if (connection_) {
    connection_->on_timer(now);
  } else if (gets_on()) {
    phase_end_ = now + kLingerTime;
  } else {
    abandon();
  }
}

void Link::take_mail(TimePoint now) {
  if (connection_) connection_->take_mail(now);
}

void Link::drain(TimePoint now) {
  if (connection_) {
    connection_->drain(now);
  } else if (phase_ == Phase::kHandshake) {
    abandon();
  }
}

void Link::abandon() {
  if (closed()) return;
  if (connection_) connection_->lost();
  connection_.reset();
  if (blocked_) transport_->discard_output();
  phase_ = Phase::kClosed;
}

}  // namespace attnserve::grpc
