#include "grpc/places.h"

namespace attnserve::grpc {

Place::~Place() {
  if (places_ != nullptr) places_->give_back(host_);
}

std::optional<Place> Places::take(std::string host) {
  const std::scoped_lock lock(mutex_);
  if (most_ != 0 && taken_ >= most_) return std::nullopt;
  std::size_t& of_host = taken_of_host_[host];
  if (most_per_host_ != 0 && of_host >= most_per_host_) return std::nullopt;
  ++of_host;
  ++taken_;
  return Place(*this, std::move(host));
}

void Places::give_back(const std::string& host) noexcept {
  const std::scoped_lock lock(mutex_);
  const auto of_host = taken_of_host_.find(host);
  if (--of_host->second == 0) taken_of_host_.erase(of_host);
  if (--taken_ == 0) none_left_.notify_all();
}

std::size_t Places::taken() const {
  const std::scoped_lock lock(mutex_);
  return taken_;
}

bool Places::wait_until_none(TimePoint end) const {
  std::unique_lock lock(mutex_);
  return none_left_.wait_until(lock, end, [this] { return taken_ == 0; });
}

}  // namespace attnserve::grpc
