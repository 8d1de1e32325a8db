// What one thread waits for: sockets, an alarm, and a bell that other threads ring.
#pragma once

#include <sys/epoll.h>

#include <array>
#include <cstdint>
#include <span>

#include "base/clock.h"
#include "grpc/descriptor.h"
#include "grpc/timers.h"

namespace attnserve::grpc {

// Something with a descriptor or a timer, served on one loop's thread.
class Watched : public Timed {
 public:
  virtual void ready(std::uint32_t events, TimePoint now) = 0;
  virtual void expire(TimePoint now) = 0;  // the time that it was scheduled for has come

 protected:
  ~Watched() = default;
};

class Poller {
 public:
  Poller();  // throws std::system_error

  void watch(int descriptor, std::uint32_t events, Watched& watched);  // throws std::system_error
  void rewatch(int descriptor, std::uint32_t events, Watched& watched);
  void unwatch(int descriptor);

  // Finds what is ready; if it may sleep, waits for that until `due` at the latest.
  void wait(bool may_sleep, TimePoint due, TimePoint now);
  // Calls `ready` of all that `wait` has found.
  void tell_ready(TimePoint now);
  // Ends a `wait`. Any thread.
  void ring();

 private:
  void set_alarm(TimePoint due, TimePoint now);

  Descriptor epoll_;
  Descriptor bell_;
  Descriptor alarm_;  // readable once alarm_due_ has come
  TimePoint alarm_due_ = kNever;
  std::array<epoll_event, 256> events_;
  std::span<const epoll_event> found_;  // part of events_
};

}  // namespace attnserve::grpc
