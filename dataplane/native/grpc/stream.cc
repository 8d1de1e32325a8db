#include "grpc/stream.h"

#include <utility>

namespace attnserve::grpc {

void Stream::send(OutMessage message) {
  unsent_.fetch_add(kPrefixBytes + message.size(), std::memory_order_relaxed);
  post(std::move(message));
}

void Stream::finish(Status status) { post(std::move(status)); }

std::size_t Stream::unsent() const { return ended() ? 0 : unsent_.load(std::memory_order_relaxed); }

}  // namespace attnserve::grpc
