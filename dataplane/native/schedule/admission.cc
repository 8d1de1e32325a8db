#include "schedule/admission.h"

#include <algorithm>
#include <cmath>

#include "base/text.h"

namespace attnserve::schedule {
namespace {

constexpr double kNewest = 0.3;  // weight of the newest interval
constexpr auto kBetweenUpdates = std::chrono::milliseconds(50);
constexpr std::int64_t kAnswersForAnUpdate = 4;
constexpr auto kArrivingSoon = std::chrono::milliseconds(250);  // a body that takes longer is slow
constexpr double kOfDeadline =
    0.5;  // an expected wait beyond this share of it comes too late, often

}  // namespace

std::variant<AdmissionController::Place, Status> AdmissionController::enter(TimePoint now,
                                                                            TimePoint deadline) {
  const std::lock_guard lock(mutex_);
  expected_.erase(expected_.begin(), expected_.lower_bound({now - kArrivingSoon, 0}));
  const std::size_t before = inside() + expected_.size();
  if (before == 0) {
    forget();
  } else {
    learn(now);
  }
  if (before >= patience_) {
    const double expected = static_cast<double>(before) * seconds_per_answer_;
    double allowed = max_seconds_;
    const char* why = "(--max-queue-ms)";
    if (deadline != kNever) {
      const double left = std::max(0.0, kOfDeadline * seconds(deadline - now));
      if (left < allowed) {
        allowed = left;
        why = "for its deadline";
      }
    }
    if (expected > allowed) {
      return Status{
          Code::kResourceExhausted,
          text("requests: ", before, " are before this one and would take about ",
               std::llround(expected * 1e3), " ms; allowed: ", std::llround(allowed * 1e3), " ms ",
               why),
          std::chrono::microseconds(std::llround(std::max(expected - allowed, 0.001) * 1e6))};
    }
  }
  const Place place{now, ++last_number_, false};
  expected_.emplace(place.entered, place.number);
  arriving_.fetch_add(1, std::memory_order_relaxed);
  return place;
}

// Nobody is before anybody: what earlier requests took says nothing of those that come.
void AdmissionController::forget() {
  seconds_per_answer_ = 0.0;
  answers_ = moving_nanoseconds_ = computing_nanoseconds_ = 0;
}

// The pace of the server from what happened since the last time. The lock is held.
void AdmissionController::learn(TimePoint now) {
  const std::int64_t answers = answers_.load(std::memory_order_relaxed);
  if (answers >= kAnswersForAnUpdate && now - updated_ >= kBetweenUpdates) {
    answers_.fetch_sub(answers, std::memory_order_relaxed);
    const auto moving = static_cast<double>(moving_nanoseconds_.exchange(0));
    const auto computing = static_cast<double>(computing_nanoseconds_.exchange(0));
    const double busier = std::max(moving / static_cast<double>(io_threads_),
                                   computing / static_cast<double>(slots_));
    const double newest = busier * 1e-9 / static_cast<double>(answers);
    seconds_per_answer_ = seconds_per_answer_ > 0
                              ? seconds_per_answer_ + kNewest * (newest - seconds_per_answer_)
                              : newest;
    updated_ = now;
  }
}

void AdmissionController::received(Place& place) {
  place.received = true;
  arriving_.fetch_sub(1, std::memory_order_relaxed);
  received_.fetch_add(1, std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  expected_.erase({place.entered, place.number});
}

void AdmissionController::leave(const Place& place, bool answered) {
  if (answered) answers_.fetch_add(1, std::memory_order_relaxed);
  if (place.received) {
    received_.fetch_sub(1, std::memory_order_relaxed);
    return;
  }
  arriving_.fetch_sub(1, std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  expected_.erase({place.entered, place.number});
}

void AdmissionController::moved_bytes(Duration busy) {
  moving_nanoseconds_.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(busy).count(),
                                std::memory_order_relaxed);
}

void AdmissionController::computed(Duration busy) {
  computing_nanoseconds_.fetch_add(
      std::chrono::duration_cast<std::chrono::nanoseconds>(busy).count(),
      std::memory_order_relaxed);
}

}  // namespace attnserve::schedule
