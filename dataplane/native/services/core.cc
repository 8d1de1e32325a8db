#include "services/core.h"

namespace attnserve::services {

std::uint64_t OpenStreams::add(std::function<void()> drain) {
  std::uint64_t number = 0;
  {
    const std::lock_guard lock(mutex_);
    number = ++last_;
    if (!draining_) {
      open_.emplace(number, std::move(drain));
      return number;
    }
  }
  drain();
  return number;
}

void OpenStreams::remove(std::uint64_t number) {
  const std::lock_guard lock(mutex_);
  open_.erase(number);
}

void OpenStreams::drain() {
  std::unordered_map<std::uint64_t, std::function<void()>> open;
  {
    const std::lock_guard lock(mutex_);
    draining_ = true;
    open.swap(open_);
  }
  for (auto& [number, drain_one] : open) drain_one();
}

std::uint64_t HealthWatchers::add(Tell tell) {
  const std::lock_guard lock(mutex_);
  tell();
  watching_.emplace(++last_, std::move(tell));
  return last_;
}

void HealthWatchers::remove(std::uint64_t number) {
  const std::lock_guard lock(mutex_);
  watching_.erase(number);
}

void HealthWatchers::changed() {
  const std::lock_guard lock(mutex_);
  for (auto& [number, tell] : watching_) tell();
}

Admitted& Admitted::operator=(Admitted&& other) noexcept {
  if (this != &other) {
    release();
    admission_ = std::exchange(other.admission_, nullptr);
    place_ = other.place_;
    answered_ = other.answered_;
  }
  return *this;
}

std::variant<Admitted, Status> Admitted::admit(Core& core, TimePoint now, TimePoint deadline) {
  if (auto closed = core.scheduler.closed()) return std::move(*closed);
  auto entered = core.admission.enter(now, deadline);
  if (auto* refused = std::get_if<Status>(&entered)) return std::move(*refused);
  return Admitted(core.admission, std::get<schedule::AdmissionController::Place>(entered));
}

std::variant<Admitted, Status> Admitted::admit_next(Core& core, const grpc::CallInfo& info,
                                                    TimePoint now, TimePoint deadline) {
  if (info.caller) {
    if (auto refused = info.caller->request(now)) return std::move(*refused);
  }
  return admit(core, now, deadline);
}

void Admitted::received() {
  if (admission_ && !place_.received) admission_->received(place_);
}

void Admitted::release() {
  if (auto* admission = std::exchange(admission_, nullptr)) admission->leave(place_, answered_);
}

}  // namespace attnserve::services
