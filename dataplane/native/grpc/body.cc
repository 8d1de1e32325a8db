#include "grpc/body.h"

#include <utility>

namespace attnserve::grpc {

std::optional<Bytes> Body::next(ByteSpan& fresh, TimePoint now) {
  if (ready_) return std::exchange(ready_, std::nullopt);
  if (!kept_.empty()) {
    ByteSpan rest = ByteSpan(kept_).subspan(kept_taken_);
    std::optional<Bytes> message = read(rest, now);
    kept_taken_ = kept_.size() - rest.size();
    if (rest.empty()) {
      kept_ = {};
      kept_taken_ = 0;
      charge_.release();
    }
    if (message) return message;
  }
  return read(fresh, now);
}

void Body::keep(ByteSpan fresh, TimePoint now) {
  if (drained()) ready_ = read(fresh, now);
  if (fresh.empty()) return;
  if (kept_taken_ > kept_.size() / 2) drop_taken();
  charge_.grow_or_throw(fresh.size());
  kept_.insert(kept_.end(), fresh.begin(), fresh.end());
}

void Body::drop_taken() {
  kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(kept_taken_));
  kept_taken_ = 0;
  charge_.release();
  charge_.grow_or_throw(kept_.size());
}

std::optional<Bytes> Body::read(ByteSpan& bytes, TimePoint now) {
  if (bytes.empty()) return std::nullopt;
  if (!reader_.under_way()) pace_.begin(now);
  const std::size_t given = bytes.size();
  std::optional<Bytes> message = reader_.next(bytes);
  pace_.took(given - bytes.size(), now);
  return message;
}

}  // namespace attnserve::grpc
