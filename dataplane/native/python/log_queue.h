// Log events on their way to Python's logging: kept in a bounded queue, so that no thread of the
// data plane waits for the interpreter. When it is full, the oldest are dropped and counted.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/log.h"

namespace attnserve::python {

struct LogEvent {
  Level level = Level::kInfo;
  std::string event;
  std::vector<std::pair<std::string, std::string>> fields;
};

class LogQueue {
 public:
  void add(const LogRecord& record) {
    LogEvent event{record.level, std::string(record.event), {}};
    for (const auto& [name, value] : record.fields) event.fields.emplace_back(name, value);
    {
      const std::lock_guard lock(mutex_);
      if (events_.size() >= kMost) {
        events_.pop_front();
        ++dropped_;
      }
      events_.push_back(std::move(event));
    }
    came_.notify_one();
  }

  std::optional<LogEvent> next(Duration timeout) {
    std::unique_lock lock(mutex_);
    came_.wait_for(lock, timeout, [this] { return !events_.empty(); });
    if (events_.empty()) return std::nullopt;
    LogEvent event = std::move(events_.front());
    events_.pop_front();
    if (dropped_ > 0) {
      event.fields.emplace_back("dropped_before", std::to_string(dropped_));
      dropped_ = 0;
    }
    return event;
  }

 private:
  static constexpr std::size_t kMost = 4096;
  std::mutex mutex_;  // guards what follows
  std::condition_variable came_;
  std::deque<LogEvent> events_;
  std::size_t dropped_ = 0;
};

}  // namespace attnserve::python
