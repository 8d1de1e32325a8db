// How a scheduler watches over deadlines, and over runs that do not end.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/log.h"
#include "base/text.h"
#include "schedule/scheduler.h"

namespace attnserve::schedule {
namespace {

Status all_wedged() {
  return {Code::kUnavailable,
          "nothing can be computed before what runs has ended, which it does not; try another "
          "server",
          {}};
}

}  // namespace

// The life of the watcher: deadlines of what waits, and of what runs for nobody any more.
void Scheduler::watch() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (next_look_ == kNever) {
      sooner_.wait(lock);
    } else {
      sooner_.wait_until(lock, next_look_);
    }
    const TimePoint now = Clock::now();
    if (stopping_ || now < next_look_) continue;
    next_look_ = kNever;
    std::vector<Entry> expired, stuck;
    std::vector<std::shared_ptr<Running>> wedged;
    auto& entries = queue_.entries();
    for (auto at = entries.begin(); at != entries.end();) {
      const TimePoint deadline = at->second.job->request->deadline;
      if (now < deadline) {
        next_look_ = std::min(next_look_, deadline);
        ++at;
        continue;
      }
      Entry taken;
      at = queue_.remove(at, taken);
      expired.push_back(std::move(taken));
    }
    for (const auto& running : running_) {
      const bool was_wedged = running->wedged;
      look_at(*running, now);
      if (running->wedged && !was_wedged) wedged.push_back(running);
    }
    if (!wedged.empty() && wedged_slots_ >= rules_.slots) {
      while (!queue_.empty()) stuck.push_back(queue_.serve());
    }
    if (expired.empty() && wedged.empty()) continue;
    lock.unlock();
    for (Entry& entry : expired) {
      entry.job->failed(
          {Code::kDeadlineExceeded, "the deadline passed before the computation could start", {}});
    }
    for (Entry& entry : stuck) entry.job->failed(all_wedged());
    for (const auto& running : wedged) abandon(*running);
    expired.clear();
    stuck.clear();
    wedged.clear();
    lock.lock();
  }
}

// Stops what runs for nobody any more or for too long, sees whether it has ended since, and when to
// look again. The lock is held.
void Scheduler::look_at(Running& running, TimePoint now) {
  TimePoint last = TimePoint::min();
  for (const Entry& entry : running.batch) {
    const RequestContext& request = *entry.job->request;
    if (!request.cancelled) last = std::max(last, request.deadline);
  }
  if (now < last) {
    next_look_ = std::min(next_look_, last);
  } else if (running.stop) {
    running.stop->request();
  }
  if (running.due == kNever || running.wedged) return;
  const TimePoint end = after(running.due, rules_.stop_seconds);
  if (now < running.due) {
    next_look_ = std::min(next_look_, running.due);
  } else if (now < end) {
    running.overdue = true;
    if (running.stop) running.stop->request();
    next_look_ = std::min(next_look_, end);
  } else {
    running.wedged = running.overdue = true;
    if (running.stop) running.stop->request();
    ++wedged_;
    if (running.holds_slot) ++wedged_slots_;
  }
}

// Tells the callers of a wedged run. No lock is held.
void Scheduler::abandon(const Running& running) const {
  const TimePoint now = Clock::now();
  log(Level::kError, "a computation does not end",
      {{"computation", running.batch.front().job->what()},
       {"requests", std::to_string(running.batch.size())},
       {"seconds", std::to_string(std::llround(attnserve::seconds(now - running.started)))}});
  for (const Entry& entry : running.batch) {
    auto lost = lost_interest(*entry.job->request, now, "ended");
    entry.job->abandoned(
        lost ? std::move(*lost)
             : Status{Code::kUnavailable,
                      "the computation does not end, though it was stopped; try another server",
                      {}});
  }
  if (rules_.wedged_changed) rules_.wedged_changed();
}

// One that was wedged has ended after all. No lock is held.
void Scheduler::has_ended(const Running& running) const {
  log(Level::kWarning, "a computation that did not end has ended",
      {{"computation", running.batch.front().job->what()},
       {"seconds",
        std::to_string(std::llround(attnserve::seconds(Clock::now() - running.started)))}});
  if (rules_.wedged_changed) rules_.wedged_changed();
}

Status Scheduler::too_long() const {
  return {Code::kDeadlineExceeded,
          text("the computation took longer than ", number_text(rules_.max_run_seconds),
               " s and was stopped (--max-run-seconds)"),
          {}};
}

// The lock is held.
std::optional<Status> Scheduler::closed_locked() const {
  if (draining_) return shutting_down();
  if (wedged_slots_ >= rules_.slots) return all_wedged();
  return std::nullopt;
}

bool Scheduler::wanted(const Running& running, TimePoint now) {
  return std::ranges::any_of(running.batch, [now](const Entry& entry) {
    const RequestContext& request = *entry.job->request;
    return !request.cancelled && now < request.deadline;
  });
}

std::optional<Status> Scheduler::lost_interest(const RequestContext& request, TimePoint now,
                                               const char* when) {
  if (request.cancelled) return Status{Code::kCancelled, "the caller cancelled the request", {}};
  if (now < request.deadline) return std::nullopt;
  return Status{
      Code::kDeadlineExceeded, text("the deadline passed before the computation ", when), {}};
}

}  // namespace attnserve::schedule
