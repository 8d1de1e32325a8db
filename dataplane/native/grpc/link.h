// One accepted socket: its transport, its HTTP/2 connection, and the way from the first handshake
// to the last byte. Knows no loop: whoever owns it tells it what the socket is ready for, and looks
// afterwards at what it waits for.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/clock.h"
#include "base/memory.h"
#include "grpc/connection.h"
#include "grpc/places.h"
#include "grpc/transport.h"

namespace attnserve::grpc {

// Makes the connection of a socket once it can talk.
using ConnectionFactory = std::function<std::unique_ptr<Connection>(
    Waker& waker, std::uint64_t number, std::string peer, TimePoint now)>;

// A socket that was accepted and has no thread yet.
struct Arrival {
  Place place;  // given back after the socket has been closed
  std::unique_ptr<Transport> transport;
  std::uint64_t number = 0;
  std::string peer;
};

// Used by one thread. `factory` and `waker` outlive it.
class Link {
 public:
  // A handshake that is not done at `handshake_end` is given up.
  Link(Arrival arrival, const ConnectionFactory& factory, Waker& waker, TimePoint now,
       TimePoint handshake_end);
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // What epoll said of the socket.
  void note(std::uint32_t events);
  // Whether `receive` has something to do.
  bool wants_read() const;
  // Reads at most what `buffer` holds, once, and hands it to the connection.
  void receive(MutableByteSpan buffer, TimePoint now);
  struct Sent {
    bool any = false;   // something was written
    bool more = false;  // others have their turn, then `send` wants to be called again
  };
  // Writes what there is until the socket takes no more, within a bound. Ends the link if all is
  // said.
  Sent send(TimePoint now);
  // Whether what is left to write waits for the socket.
  bool blocked() const { return blocked_; }

  TimePoint next_timer() const;
  void expire(TimePoint now);  // next_timer() has come
  void take_mail(TimePoint now);
  void drain(TimePoint now);
  // Ends every call and is closed.
  void abandon();

  bool closed() const { return phase_ == Phase::kClosed; }
  int descriptor() const { return transport_->descriptor(); }
  std::uint64_t number() const { return number_; }
  std::size_t open_calls() const { return connection_ ? connection_->open_calls() : 0; }

 private:
  enum class Phase : std::uint8_t {
    kHandshake,  // no connection yet
    kOpen,       // connection_ is there in this phase only
    kLingering,  // all is said; what the peer still sends is thrown away, see linger()
    kClosed,
  };

  void open(TimePoint now);
  void linger(TimePoint now);
  void end_output();
  bool gets_on();

  Place place_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Connection> connection_;
  const ConnectionFactory& factory_;
  Waker& waker_;
  std::string peer_;
  std::uint64_t number_;
  TimePoint phase_end_;  // of a handshake or of lingering
  // What the peer's system lacked when this was looked at last, while lingering.
  std::size_t unacknowledged_ = static_cast<std::size_t>(-1);
  Phase phase_ = Phase::kHandshake;
  bool readable_ = false;  // the socket may have bytes that were not read yet
  bool ended_ = false;     // the peer has closed its side, or both: read until told so
  bool blocked_ = false;
  bool output_ended_ = false;
};

}  // namespace attnserve::grpc
