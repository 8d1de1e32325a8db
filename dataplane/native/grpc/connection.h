// One HTTP/2 connection that carries gRPC: bytes in, events out, and the other way round. It knows
// no socket, no thread and no clock but the times it is given, so its tests need none.
//
// Owned by one thread, which calls everything here. Only `Call`s (grpc/call.h) are used from other
// threads: what they ask for is posted to the mailbox, and `Waker::wake` is called once.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/memory.h"
#include "base/pace.h"
#include "grpc/call.h"

namespace attnserve::grpc {

struct ConnectionOptions {
  std::uint32_t max_concurrent_streams = 1024;
  std::uint32_t stream_window = 1U << 19;      // bytes that a caller may send ahead on one stream
  std::uint32_t connection_window = 1U << 24;  // on all streams together
  std::uint32_t max_frame_size = 1U << 20;     // that callers may send
  std::size_t max_header_bytes = 16U << 10;    // of one call
  std::size_t max_unsent_bytes = 64U << 20;    // answers that wait for one connection's socket
  Duration header_timeout = std::chrono::seconds(10);  // preface and SETTINGS; each header block
  PaceRule body_pace;                                  // of a message under way
  // A caller that reads nothing of what waits for it for so long is cut off.
  Duration write_timeout = std::chrono::seconds(30);
  Duration idle_timeout = std::chrono::minutes(5);  // no call open; 0: never
  Duration max_age = Duration::zero();              // GOAWAY after so long; 0: never
  Duration max_age_grace = std::chrono::seconds(30);
  Duration keepalive_interval = std::chrono::hours(2);  // pings of ours; 0: none
  Duration keepalive_timeout = std::chrono::seconds(20);
  Duration min_ping_interval =
      std::chrono::milliseconds(500);  // of callers'; more often: GOAWAY, after strikes
  // Of streams younger than 100 ms, by the caller or by its fault (rapid reset, CVE-2023-44487),
  // and changes of settings; beyond: GOAWAY.
  std::uint32_t max_resets = 1000;
  std::uint32_t resets_per_second = 200;  // by which the number above fills up again
};

class Connection;

// Tells the thread that owns a connection that its mailbox is not empty. Any thread; the mailbox's
// lock is held, so that the connection cannot go meanwhile: nothing of the connection may be
// called.
class Waker {
 public:
  virtual ~Waker() = default;
  virtual void wake(Connection& connection) = 0;
};

class Connection {
 public:
  // All references outlive it. `peer` as CallInfo has it.
  static std::unique_ptr<Connection> create(Service& service, ByteBudget& budget, Waker& waker,
                                            const ConnectionOptions& options, std::uint64_t number,
                                            std::string peer, TimePoint now);
  virtual ~Connection() = default;

  // Names in the certificate that the peer has shown, the most telling first, and whether it would
  // be taken now, which is asked from time to time; before `receive`.
  virtual void set_certificate(std::vector<std::string> names, std::function<bool()> trusted) {
    (void)names, (void)trusted;
  }
  // Takes bytes that the peer sent. Never throws; what breaks the protocol is answered by GOAWAY or
  // RST_STREAM, see `finished`.
  virtual void receive(ByteSpan bytes, TimePoint now) = 0;
  // What is to be written next, without copying; the number of entries filled. They stay valid
  // until `written` or `receive` is called.
  virtual std::size_t output(std::span<iovec> into) = 0;
  // The socket took so many of those bytes.
  virtual void written(std::size_t size, TimePoint now) = 0;
  // Carries out what calls were asked for by other threads.
  virtual void take_mail(TimePoint now) = 0;
  // When `on_timer` wants to be called next; kNever: not at all.
  virtual TimePoint next_timer() const = 0;
  virtual void on_timer(TimePoint now) = 0;
  // Takes no new calls (GOAWAY); those under way go on. `finished` once they have ended.
  virtual void drain(TimePoint now) = 0;
  // The socket is gone: every call ends with kCancelled.
  virtual void lost() = 0;
  // Whether reading should go on: false while too much waits to be written.
  virtual bool wants_read() const = 0;
  // Whether it may be closed: everything has been said and written.
  virtual bool finished() const = 0;
  virtual std::size_t open_calls() const = 0;
  virtual std::uint64_t number() const = 0;
};

}  // namespace attnserve::grpc
