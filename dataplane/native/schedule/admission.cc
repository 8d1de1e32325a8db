#include "schedule/admission.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/text.h"

namespace attnserve::schedule {
namespace {

constexpr double kNewest = 0.3;     // weight of the newest interval
constexpr double kMostOfKnown = 4;  // a single interval may mislead
constexpr auto kBetweenUpdates = std::chrono::milliseconds(50);
constexpr std::int64_t kAnswersForAnUpdate = 4;                 // once something is known
constexpr auto kArrivingSoon = std::chrono::milliseconds(250);  // a body that takes longer is slow

// What a call may wait is a share of what its deadline leaves: much in a burst, which ends by
// itself; little in a queue that stands, in which a longer wait serves nobody more. A queue stands
// when it has not been empty for as long as the call could wait in a burst. After B. Maurer, "Fail
// at Scale", ACM Queue 13(8), 2015, and K. Nichols and V. Jacobson, "Controlling Queue Delay", ACM
// Queue 10(5), 2012.
constexpr double kOfDeadline = 0.5;
constexpr double kOfDeadlineStanding = 0.1;
// What has come and waits to be computed: enough to be busy with until more comes.
constexpr double kAhead = 0.01;  // seconds
// But for these the next ones would not be here when a computation ends.
constexpr double kAlwaysBefore = 2;

// The longest wait of a call whose deadline leaves so many seconds.
double allowed_before_deadline(double left, double since_empty, double seconds_per_answer) {
  const double burst = kOfDeadline * left;
  if (since_empty <= burst) return burst;
  return std::min(burst, std::max(kOfDeadlineStanding * left, kAlwaysBefore * seconds_per_answer));
}

}  // namespace

std::variant<AdmissionController::Place, Status> AdmissionController::enter(TimePoint now,
                                                                            TimePoint deadline) {
  const std::lock_guard lock(mutex_);
  expected_.erase(expected_.begin(), expected_.lower_bound({now - kArrivingSoon, 0}));
  const std::size_t before = inside() + expected_.size();
  if (before == 0) {
    empty_at_ = now;
    forget();
  } else {
    learn(now);
    if (auto refused = refusal(before, now, deadline)) return std::move(*refused);
  }
  const Place place{now, ++last_number_, false};
  expected_.emplace(place.entered, place.number);
  arriving_.fetch_add(1, std::memory_order_relaxed);
  return place;
}

// The lock is held.
std::optional<Status> AdmissionController::refusal(std::size_t before, TimePoint now,
                                                   TimePoint deadline) const {
  double allowed = before < patience_ ? std::numeric_limits<double>::infinity() : max_seconds_;
  const char* why = "(--max-queue-ms)";
  if (deadline != kNever) {
    const double left = std::max(0.0, seconds(deadline - now));
    const double share =
        allowed_before_deadline(left, seconds(now - empty_at_), seconds_per_answer_);
    if (share < allowed) {
      allowed = share;
      why = "for its deadline";
    }
  }
  const double expected = static_cast<double>(before) * seconds_per_answer_;
  if (expected <= allowed) return std::nullopt;
  return Status{Code::kResourceExhausted,
                text("requests: ", before, " are before this one and would take about ",
                     std::llround(expected * 1e3), " ms; allowed: ", std::llround(allowed * 1e3),
                     " ms ", why),
                std::chrono::microseconds(std::llround(std::max(expected - allowed, 0.001) * 1e6))};
}

// Nobody is before anybody: what earlier requests took says nothing of those that come.
void AdmissionController::forget() {
  seconds_per_answer_ = 0.0;
  answers_ = bodies_ = moving_nanoseconds_ = computing_nanoseconds_ = 0;
}

// The pace of the server from what happened since the last time. The lock is held.
void AdmissionController::learn(TimePoint now) {
  const std::int64_t answers = answers_.load(std::memory_order_relaxed);
  const double known = seconds_per_answer_;
  const bool due =
      known > 0 ? answers >= kAnswersForAnUpdate && now - updated_ >= kBetweenUpdates : answers > 0;
  if (due) {
    answers_.fetch_sub(answers, std::memory_order_relaxed);
    const auto moving = static_cast<double>(moving_nanoseconds_.exchange(0));
    const auto computing = static_cast<double>(computing_nanoseconds_.exchange(0));
    // Bodies are moved before they are answered: many may have come for few answers.
    const auto bodies = static_cast<double>(std::max(bodies_.exchange(0), answers));
    const double of_moving = moving / (static_cast<double>(io_threads_) * bodies);
    const double of_computing =
        computing / (static_cast<double>(slots_) * static_cast<double>(answers));
    double newest = std::max(of_moving, of_computing) * 1e-9;
    if (known > 0) newest = known + kNewest * (std::min(newest, kMostOfKnown * known) - known);
    seconds_per_answer_ = newest;
    updated_ = now;
  }
}

bool AdmissionController::wants_bodies() const {
  const std::size_t received = inside();
  return received <= slots_ + 1 || static_cast<double>(received) * seconds_per_answer_ < kAhead;
}

void AdmissionController::received(Place& place) {
  place.received = true;
  arriving_.fetch_sub(1, std::memory_order_relaxed);
  received_.fetch_add(1, std::memory_order_relaxed);
  bodies_.fetch_add(1, std::memory_order_relaxed);
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
