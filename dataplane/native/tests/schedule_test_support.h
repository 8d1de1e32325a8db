// A job whose length a test decides, and who was told what.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "schedule/scheduler.h"

namespace attnserve::schedule {

class FakeStop final : public engine::Stop {
 public:
  void request() override { requested_ = true; }
  bool requested() const override { return requested_; }

 private:
  std::atomic<bool> requested_{false};
};

// Runs until it is released, or stopped; counts how it ends.
class FakeJob : public Job {
 public:
  explicit FakeJob(std::uint64_t kind = 1, bool held = false) : held_(held) {
    request = std::make_shared<RequestContext>();
    key[0] = kind;
  }

  void run(std::span<Job* const> batch, engine::Stop* stop) override {
    {
      const std::lock_guard lock(mutex_);
      batch_ = batch.size();
      started_ = true;
    }
    changed_.notify_all();
    std::unique_lock lock(mutex_);
    while (held_ && (deaf || !(stop && stop->requested()))) {
      changed_.wait_for(lock, std::chrono::milliseconds(1));
    }
    if (!deaf && stop && stop->requested()) throw RequestError(Code::kCancelled, "stopped");
    if (fails) throw std::runtime_error("a fault");
  }
  std::unique_ptr<engine::Stop> make_stop() override { return std::make_unique<FakeStop>(); }
  void done(const Outcome& outcome) noexcept override { end(outcome, std::nullopt); }
  void failed(Status status) noexcept override { end(std::nullopt, std::move(status)); }
  void abandoned(Status status) noexcept override {
    was_abandoned = true;
    end(std::nullopt, std::move(status));
  }

  void release() {
    {
      const std::lock_guard lock(mutex_);
      held_ = false;
    }
    changed_.notify_all();
  }
  void wait_started() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return started_; });
  }
  void wait_ended() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ends_ > 0; });
  }
  bool ended() const {
    const std::lock_guard lock(mutex_);
    return ends_ > 0;
  }
  int ends() const {
    const std::lock_guard lock(mutex_);
    return ends_;
  }
  std::size_t batch() const {
    const std::lock_guard lock(mutex_);
    return batch_;
  }
  std::optional<Status> status() const {
    const std::lock_guard lock(mutex_);
    return status_;
  }
  std::optional<Outcome> outcome() const {
    const std::lock_guard lock(mutex_);
    return outcome_;
  }

  bool fails = false;
  bool deaf = false;  // to a stop
  std::atomic<bool> was_abandoned{false};

 private:
  void end(std::optional<Outcome> outcome, std::optional<Status> status) {
    const std::lock_guard lock(mutex_);
    ++ends_;
    outcome_ = outcome;
    status_ = std::move(status);
    changed_.notify_all();
  }

  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  bool held_;
  bool started_ = false;
  int ends_ = 0;
  std::size_t batch_ = 0;
  std::optional<Outcome> outcome_;
  std::optional<Status> status_;
};

inline std::shared_ptr<FakeJob> fake_job(std::uint64_t kind = 1, bool held = false) {
  return std::make_shared<FakeJob>(kind, held);
}

}  // namespace attnserve::schedule
