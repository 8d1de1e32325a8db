// The one clock: monotonic, for deadlines and durations.
#pragma once

#include <chrono>

namespace attnserve {

using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;
using Duration = Clock::duration;

constexpr TimePoint kNever = TimePoint::max();

inline double seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace attnserve
