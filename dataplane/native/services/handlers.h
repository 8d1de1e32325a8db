// Methods that are handled elsewhere, by the control plane: requests wait in a bounded queue until
// one of its threads takes them. A handler that hangs delays no hot method, since none waits for it
// here.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "base/clock.h"
#include "base/memory.h"
#include "base/status.h"
#include "schedule/request_context.h"

namespace attnserve::services {

// One message for the control plane. Answered exactly once; one that is dropped unanswered is
// answered INTERNAL.
class HandledRequest {
 public:
  using Answer = std::function<void(Status, Bytes)>;  // any thread

  HandledRequest(std::string path, std::string peer, Bytes message,
                 std::shared_ptr<schedule::RequestContext> request, Answer answer);
  ~HandledRequest();
  HandledRequest(const HandledRequest&) = delete;
  HandledRequest& operator=(const HandledRequest&) = delete;

  const std::string path;
  const std::string peer;
  const Bytes message;
  const std::shared_ptr<schedule::RequestContext> request;

  void answer(Status status, Bytes bytes);

 private:
  std::mutex mutex_;  // guards answer_, which is empty once it was called
  Answer answer_;
};

class HandlerQueue {
 public:
  explicit HandlerQueue(std::size_t most) : most_(most) {}

  // RESOURCE_EXHAUSTED if so many wait already.
  std::optional<Status> push(std::shared_ptr<HandledRequest> request);
  // The next one; waits for it up to `timeout`. nullptr: none came, or the queue was closed.
  std::shared_ptr<HandledRequest> pop(Duration timeout);
  void close();

 private:
  const std::size_t most_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable came_;
  std::deque<std::shared_ptr<HandledRequest>> waiting_;
  bool closed_ = false;
};

}  // namespace attnserve::services
