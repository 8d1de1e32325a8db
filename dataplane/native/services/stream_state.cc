#include "services/stream_state.h"

#include <utility>

namespace attnserve::services {

std::shared_ptr<StreamState> StreamState::open(Core& core, std::shared_ptr<grpc::Call> call,
                                               std::string_view method, bool has_sessions) {
  const std::shared_ptr<StreamState> state(new StreamState(core, std::move(call), method));
  const auto drain = [weak = std::weak_ptr(state)] {
    if (const auto open = weak.lock()) open->drain();
  };
  const auto tell = [weak = std::weak_ptr(state)](Bytes message) {
    if (const auto open = weak.lock()) open->tell(std::move(message));
  };
  state->number_ = core.streams.add({has_sessions, drain, tell});
  return state;
}

void StreamState::begun() {
  const std::lock_guard lock(mutex_);
  ++unanswered_;
}

void StreamState::started(const std::shared_ptr<schedule::RequestContext>& request) {
  ++computing_;
  const std::lock_guard lock(mutex_);
  started_[request] = true;
}

void StreamState::started_early(const std::shared_ptr<schedule::RequestContext>& request) {
  const std::lock_guard lock(mutex_);
  started_[request] = false;
}

void StreamState::answer(const std::shared_ptr<schedule::RequestContext>& request,
                         Delivery delivery) {
  count(delivery.status.code);
  const auto recording = request ? request->recording : nullptr;
  if (recording) recording->status(delivery.status.code);
  std::unique_lock lock(mutex_);
  ++queued_;
  if (const auto found = started_.find(request); found != started_.end()) {
    if (found->second) --computing_;
    started_.erase(found);
  }
  // The messages of one answer come one after another.
  for (OutMessage& message : delivery.messages) call_->send(std::move(message));
  if (recording && recording != info().recording) recording->end();
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
    count(status.code);
    finish(std::move(status));
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
  if (unfinished && reason != Code::kOk) count(reason);
  if (const auto& recording = info().recording) recording->status(reason);
  cancel_all();
}

void StreamState::pause_if_full() {
  if (paused_ || !full()) return;
  paused_ = true;
  call_->pause();
}

void StreamState::all_sent() {
  queued_ = 0;
  if (!paused_ || full()) return;
  paused_ = false;
  call_->resume();
}

bool StreamState::draining() const {
  const std::lock_guard lock(mutex_);
  return draining_;
}

void StreamState::count(Code code) {
  if (!method_.empty()) core_.statistics.count(method_, code);
}

void StreamState::finish(Status status) {
  if (const auto& recording = info().recording) recording->status(status.code);
  call_->finish(std::move(status));
}

void StreamState::drain() {
  std::unique_lock lock(mutex_);
  draining_ = true;
  finish_if_idle(lock);
}

void StreamState::tell(Bytes message) {
  const std::lock_guard lock(mutex_);
  if (!over_) call_->send(OutMessage::of(std::move(message)));
}

void StreamState::cancel_all() {
  std::unordered_map<std::shared_ptr<schedule::RequestContext>, bool> started;
  {
    const std::lock_guard lock(mutex_);
    started = started_;
  }
  for (const auto& [request, takes_room] : started) core_.scheduler.cancel(request);
}

void StreamState::finish_if_idle(const std::unique_lock<std::mutex>&) {
  if (over_ || unanswered_ > 0 || (!read_all_ && !draining_)) return;
  over_ = true;
  finish(read_all_ ? Status{} : schedule::shutting_down());
}

}  // namespace attnserve::services
