#include "services/stream_state.h"

#include <utility>

namespace attnserve::services {
namespace {

const Status kShuttingDown{Code::kUnavailable, "the server is shutting down; try another one", {}};

}  // namespace

std::shared_ptr<StreamState> StreamState::open(Core& core, std::shared_ptr<grpc::Call> call,
                                               const StreamMethod& method) {
  const std::shared_ptr<StreamState> state(new StreamState(core, std::move(call), method));
  state->number_ = core.streams.add([weak = std::weak_ptr(state)] {
    if (const auto open = weak.lock()) open->drain();
  });
  return state;
}

void StreamState::begun() {
  const std::lock_guard lock(mutex_);
  ++unanswered_;
}

void StreamState::started(const std::shared_ptr<schedule::RequestContext>& request) {
  ++computing_;
  const std::lock_guard lock(mutex_);
  started_.insert(request);
}

void StreamState::answer(std::uint64_t request_id,
                         const std::shared_ptr<schedule::RequestContext>& request,
                         Delivery delivery) {
  core_.statistics.count(method_.name, delivery.status.code);
  if (!delivery.status.ok()) {
    delivery.messages.clear();
    delivery.messages.push_back(OutMessage::of(method_.encode_error(request_id, delivery.status)));
  }
  std::unique_lock lock(mutex_);
  ++queued_;
  if (request && started_.erase(request) > 0) --computing_;
  // The messages of one answer come one after another.
  for (OutMessage& message : delivery.messages) call_->send(std::move(message));
  --unanswered_;
  finish_if_idle(lock);
}

void StreamState::read_all() {
  std::unique_lock lock(mutex_);
  read_all_ = true;
  finish_if_idle(lock);
}

void StreamState::fail(Status status) {
  {
    const std::lock_guard lock(mutex_);
    if (over_) return;
    over_ = true;
    core_.statistics.count(method_.name, status.code);
    call_->finish(std::move(status));
  }
  cancel_all();
}

void StreamState::ended(Code reason) {
  core_.streams.remove(number_);
  bool unfinished = false;
  {
    const std::lock_guard lock(mutex_);
    unfinished = !over_;
    over_ = true;
  }
  if (unfinished && reason != Code::kOk) core_.statistics.count(method_.name, reason);
  cancel_all();
}

bool StreamState::draining() const {
  const std::lock_guard lock(mutex_);
  return draining_;
}

void StreamState::drain() {
  std::unique_lock lock(mutex_);
  draining_ = true;
  finish_if_idle(lock);
}

void StreamState::cancel_all() {
  std::unordered_set<std::shared_ptr<schedule::RequestContext>> started;
  {
    const std::lock_guard lock(mutex_);
    started = started_;
  }
  for (const auto& request : started) core_.scheduler.cancel(request);
}

void StreamState::finish_if_idle(const std::unique_lock<std::mutex>&) {
  if (over_ || unanswered_ > 0 || (!read_all_ && !draining_)) return;
  over_ = true;
  call_->finish(read_all_ ? Status{} : kShuttingDown);
}

}  // namespace attnserve::services
