#include "base/rate.h"

#include <algorithm>

namespace attnserve {

void Rate::set(double per_second) {
  const std::lock_guard lock(mutex_);
  if (per_second == per_second_) return;
  per_second_ = per_second;
  left_ = std::max(per_second, 1.0);
}

std::optional<Duration> Rate::take(TimePoint now) {
  const std::lock_guard lock(mutex_);
  if (per_second_ <= 0) return std::nullopt;
  if (now > refilled_) {
    left_ = std::min(std::max(per_second_, 1.0), left_ + seconds(now - refilled_) * per_second_);
    refilled_ = now;
  }
  if (left_ >= 1) {
    left_ -= 1;
    return std::nullopt;
  }
  return std::chrono::duration_cast<Duration>(
      std::chrono::duration<double>((1 - left_) / per_second_));
}

}  // namespace attnserve
