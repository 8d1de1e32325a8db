#include "grpc/manners.h"

#include <algorithm>
#include <utility>

namespace attnserve::grpc {

namespace {

constexpr std::uint32_t kMostStrikes = 10;

}  // namespace

bool Manners::nuisance(TimePoint now) {
  left_ = std::min(most_, left_ + per_second_ * seconds(now - filled_));
  filled_ = now;
  if (left_ < 1) return false;
  left_ -= 1;
  return true;
}

bool Manners::ping(TimePoint now) {
  const Duration interval = now - std::exchange(last_ping_, now);
  if (std::exchange(answered_, false) || interval >= min_ping_interval_) {
    strikes_ = 0;
    return true;
  }
  return ++strikes_ <= kMostStrikes;
}

}  // namespace attnserve::grpc
