#include "services/handlers.h"

#include <utility>

#include "schedule/scheduler.h"
#include "services/waiting.h"

namespace attnserve::services {

HandledRequest::HandledRequest(std::string path_, std::string peer_, Bytes message_,
                               std::shared_ptr<schedule::RequestContext> request_, Answer answer)
    : path(std::move(path_)),
      peer(std::move(peer_)),
      message(std::move(message_)),
      request(std::move(request_)),
      answer_(std::move(answer)) {}

HandledRequest::~HandledRequest() {
  if (!answer_) return;
  answer({Code::kInternal, "a fault in the server: the request was dropped", {}}, {});
}

void HandledRequest::answer(Status status, Bytes bytes) {
  Answer once;
  {
    const std::lock_guard lock(mutex_);
    once = std::exchange(answer_, nullptr);
  }
  if (once) once(std::move(status), std::move(bytes));
}

std::optional<Status> HandlerQueue::push(std::shared_ptr<HandledRequest> request) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return schedule::shutting_down();
    if (waiting_.size() >= most_) return too_many_waiting(most_);
    waiting_.push_back(std::move(request));
  }
  came_.notify_one();
  return std::nullopt;
}

std::shared_ptr<HandledRequest> HandlerQueue::pop(Duration timeout) {
  std::unique_lock lock(mutex_);
  came_.wait_for(lock, timeout, [this] { return closed_ || !waiting_.empty(); });
  if (waiting_.empty()) return nullptr;
  auto next = std::move(waiting_.front());
  waiting_.pop_front();
  lock.unlock();
  if (const auto& recording = next->request->recording) {
    recording->mark(tracing::Mark::kTaken, Clock::now());
  }
  return next;
}

void HandlerQueue::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  came_.notify_all();
}

}  // namespace attnserve::services
