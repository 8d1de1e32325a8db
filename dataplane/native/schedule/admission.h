// Who may come in: decided when the headers of a call have come and before a byte of its body is
// read, so that refusing costs next to nothing.
//
// What a newcomer would wait for is told by how many requests are before it and by how fast answers
// come out while the server is busy: Little's law (J. D. C. Little, "A proof for the queuing
// formula L = lambda W", 1961). Busy is what threads are while they move bytes or compute, not
// while they wait for a caller: a slow upload keeps nobody out.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <set>
#include <utility>
#include <variant>

#include "base/clock.h"
#include "base/status.h"

namespace attnserve::schedule {

class AdmissionController {
 public:
  // `max_seconds`: the longest expected wait; a request beyond it is refused, unless fewer than
  // `patience` are before it: callers of long contexts expect to wait for a few. One with a
  // deadline is refused, however few are before it, when the wait would take too much of that.
  AdmissionController(double max_seconds, std::size_t patience, std::size_t io_threads,
                      std::size_t slots)
      : max_seconds_(max_seconds), patience_(patience), io_threads_(io_threads), slots_(slots) {}

  // One request's place before others.
  struct Place {
    TimePoint entered{};
    std::uint64_t number = 0;
    bool received = false;
  };

  // Asks for one request's place, which counts until `leave`; or a refusal.
  std::variant<Place, Status> enter(TimePoint now, TimePoint deadline);
  // Its body is complete: from now on it is the server's, not its caller's, that it takes time.
  void received(Place& place);
  // It has been answered, or never will be.
  void leave(const Place& place, bool answered);
  // What threads were busy with: moving bytes on a connection's thread, or computing.
  void moved_bytes(Duration busy);
  void computed(Duration busy);

  // Whether bodies that have come last for so short a time that more should come now.
  bool wants_bodies() const;

  std::size_t inside() const { return received_.load(std::memory_order_relaxed); }
  std::size_t arriving() const { return arriving_.load(std::memory_order_relaxed); }

 private:
  std::optional<Status> refusal(std::size_t before, TimePoint now, TimePoint deadline) const;
  void forget();
  void learn(TimePoint now);

  const double max_seconds_;
  const std::size_t patience_, io_threads_, slots_;
  std::atomic<std::size_t> arriving_{0};  // headers have come, the body has not
  std::atomic<std::size_t> received_{0};
  std::atomic<std::int64_t> moving_nanoseconds_{0}, computing_nanoseconds_{0};
  std::atomic<std::int64_t> bodies_{0}, answers_{0};
  // Of the busier resource; 0: not known yet. Written with the lock held.
  std::atomic<double> seconds_per_answer_{0.0};
  mutable std::mutex mutex_;  // guards what follows
  TimePoint updated_{};
  TimePoint empty_at_{};  // when a request last found nobody before it
  std::uint64_t last_number_ = 0;
  // Those whose bodies have not come yet, but may soon: who entered long ago is slow.
  std::set<std::pair<TimePoint, std::uint64_t>> expected_;
};

}  // namespace attnserve::schedule
