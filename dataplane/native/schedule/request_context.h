// One request's stay in the server, shared by all that work for it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "base/clock.h"
#include "base/trace_context.h"
#include "tracing/recorder.h"

namespace attnserve::schedule {

constexpr std::uint32_t kHigh = 1, kNormal = 2, kLow = 3;

// Everything but `cancelled` is set before the request is submitted and stays.
struct RequestContext {
  TimePoint arrived{};          // when its message was complete
  TimePoint deadline = kNever;  // after which nobody waits for the answer
  // Callers that wait are served in turn: one with a name by its number, else a connection by its.
  std::uint64_t caller = 0;
  std::uint32_t priority = kNormal;
  TraceContext trace;                             // that it belongs to, if any
  std::shared_ptr<tracing::Recording> recording;  // of it, if it is recorded
  std::atomic<bool> cancelled{false};

  // Moves the deadline to so many microseconds from `now`, unless it is sooner; 0 leaves it.
  void shorten(std::uint64_t microseconds, TimePoint now) {
    constexpr std::uint64_t kLongest = 1'000'000'000ULL * 3600;  // beyond it: none
    if (microseconds == 0 || microseconds > kLongest) return;
    const auto own = now + std::chrono::microseconds(microseconds);
    if (own < deadline) deadline = own;
  }
};

}  // namespace attnserve::schedule
