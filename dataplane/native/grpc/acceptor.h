// Takes the connections of one listening socket, within bounds, and hands each to a loop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "base/clock.h"
#include "grpc/listener.h"
#include "grpc/loop.h"
#include "grpc/places.h"
#include "grpc/tls.h"

namespace attnserve::grpc {

// Lives on one loop's thread, from the moment that it starts. All references outlive it.
class Acceptor final : public Watched {
 public:
  using HandOver = std::function<void(Arrival)>;

  // `tls` may be nullptr.
  Acceptor(Loop& loop, Listener listener, Places& places, const TlsContext* tls,
           HandOver hand_over);

  const SocketAddress& address() const { return listener_.address(); }
  void start();  // before the loop starts; throws std::system_error
  // Closes the listening socket.
  void stop();

  void ready(std::uint32_t events, TimePoint now) override;
  void expire(TimePoint now) override;

 private:
  bool accept_one(TimePoint now);
  void welcome(Descriptor socket, const SocketAddress& from, TimePoint now);
  void turn_one_away(TimePoint now);
  void pause(TimePoint now);
  void tell_of_refusals(const char* reason, TimePoint now);

  Loop& loop_;
  Listener listener_;
  Places& places_;
  const TlsContext* tls_;
  const HandOver hand_over_;
  // Given up for a moment where no descriptor is left, to close who waits instead of letting him
  // wait for ever.
  Descriptor spare_;
  std::size_t refused_ = 0;  // since it was told of last
  TimePoint next_telling_{};
};

}  // namespace attnserve::grpc
