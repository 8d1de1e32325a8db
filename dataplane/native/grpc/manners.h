// What callers may not do too often. One connection's; others do not suffer from it.
#pragma once

#include <cstdint>

#include "base/clock.h"
#include "grpc/connection.h"

namespace attnserve::grpc {

class Manners {
 public:
  Manners(const ConnectionOptions& options, TimePoint now)
      : most_(options.max_resets),
        per_second_(options.resets_per_second),
        min_ping_interval_(options.min_ping_interval),
        left_(options.max_resets),
        filled_(now) {}

  // A stream was reset, or settings came: work for nothing. False: too often.
  bool nuisance(TimePoint now);
  // A ping came. False: too often. Callers that measure their bandwidth ping after what they
  // receive, as often as the way there and back lets them, so a ping after an answer is free.
  bool ping(TimePoint now);
  void answered() { answered_ = true; }

 private:
  double most_;
  double per_second_;
  Duration min_ping_interval_;

  double left_;  // nuisances, at time filled_
  TimePoint filled_;
  TimePoint last_ping_{};
  std::uint32_t strikes_ = 0;
  bool answered_ = false;  // since the last ping
};

}  // namespace attnserve::grpc
