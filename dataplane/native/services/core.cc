#include "services/core.h"

namespace attnserve::services {

std::uint64_t OpenStreams::add(OpenStream stream) {
  std::uint64_t number = 0;
  {
    const std::lock_guard lock(mutex_);
    number = ++last_;
    if (!(stream.has_sessions ? draining_ : draining_others_)) {
      open_.emplace(number, std::move(stream));
      return number;
    }
  }
  stream.drain();
  return number;
}

void OpenStreams::remove(std::uint64_t number) {
  const std::lock_guard lock(mutex_);
  open_.erase(number);
}

void OpenStreams::tell(std::uint64_t number, Bytes message) {
  std::function<void(Bytes)> tell;
  {
    const std::lock_guard lock(mutex_);
    const auto found = open_.find(number);
    if (found == open_.end()) return;
    tell = found->second.tell;
  }
  tell(std::move(message));
}

void OpenStreams::drain_without_sessions() { drain_some(false); }

void OpenStreams::drain() { drain_some(true); }

void OpenStreams::drain_some(bool all) {
  std::vector<OpenStream> drained;
  {
    const std::lock_guard lock(mutex_);
    draining_others_ = true;
    draining_ = draining_ || all;
    for (auto at = open_.begin(); at != open_.end();) {
      if (at->second.has_sessions && !all) {
        ++at;
        continue;
      }
      drained.push_back(std::move(at->second));
      at = open_.erase(at);
    }
  }
  for (const OpenStream& each : drained) each.drain();
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
