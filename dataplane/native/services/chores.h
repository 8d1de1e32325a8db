// Short work that may block for a moment, such as claiming the pages of shared memory, done by a
// thread of its own so that no connection waits for it.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>

#include "base/clock.h"
#include "base/status.h"

namespace attnserve::services {

class Chores {
 public:
  // Calls `regularly`, if any, whenever about so much time has passed.
  explicit Chores(std::function<void()> regularly = nullptr,
                  Duration period = std::chrono::seconds(1));
  ~Chores();  // does what is left, then ends
  // RESOURCE_EXHAUSTED if too many wait. A chore throws nothing.
  std::optional<Status> add(std::function<void()> chore);

 private:
  void work();

  const std::function<void()> regularly_;
  const Duration period_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable came_;
  std::deque<std::function<void()>> waiting_;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace attnserve::services
