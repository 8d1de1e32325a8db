// How often something may happen.
#pragma once

#include <mutex>
#include <optional>

#include "base/clock.h"

namespace attnserve {

// So many a second, and those of a second at once; 0: as many as there are.
// After J. Turner, "New Directions in Communications", IEEE Communications 24(10), 1986 (the token
// bucket). Any thread.
class Rate {
 public:
  void set(double per_second);
  // Nothing: it is taken. Else: after which time there is room for one.
  std::optional<Duration> take(TimePoint now);

 private:
  std::mutex mutex_;  // guards what follows
  double per_second_ = 0;
  double left_ = 0;
  TimePoint refilled_{};
};

}  // namespace attnserve
