#include "services/chores.h"

#include <pthread.h>

#include <utility>

#include "services/waiting.h"

namespace attnserve::services {
namespace {

constexpr std::size_t kMostWaiting = 1024;

}  // namespace

Chores::Chores(std::function<void()> regularly, Duration period)
    : regularly_(std::move(regularly)), period_(period), thread_([this] { work(); }) {
  pthread_setname_np(thread_.native_handle(), "chores");
}

Chores::~Chores() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  came_.notify_all();
  thread_.join();
}

std::optional<Status> Chores::add(std::function<void()> chore) {
  {
    const std::lock_guard lock(mutex_);
    if (waiting_.size() >= kMostWaiting) return too_many_waiting(kMostWaiting);
    waiting_.push_back(std::move(chore));
  }
  came_.notify_one();
  return std::nullopt;
}

void Chores::work() {
  std::unique_lock lock(mutex_);
  const auto came = [this] { return ending_ || !waiting_.empty(); };
  TimePoint next = regularly_ ? Clock::now() + period_ : kNever;
  while (true) {
    if (next == kNever) {
      came_.wait(lock, came);
    } else {
      came_.wait_until(lock, next, came);
      if (!ending_ && Clock::now() >= next) {
        lock.unlock();
        regularly_();
        lock.lock();
        next = Clock::now() + period_;
        continue;
      }
    }
    if (waiting_.empty()) return;
    auto chore = std::move(waiting_.front());
    waiting_.pop_front();
    lock.unlock();
    chore();
    chore = nullptr;  // with what it holds, before others wait for the lock
    lock.lock();
  }
}

}  // namespace attnserve::services
