#include "grpc/message_buffer.h"

#include <utility>

#include "base/copy.h"

namespace attnserve::grpc {

void MessageBuffer::reserve(std::size_t capacity) {
  Bytes larger = Bytes::allocate(capacity);
  copy_bytes(larger.data(), bytes_.data(), size_);
  larger.lease = bytes_.empty() ? Lease(*budget_) : std::move(bytes_.lease);
  bytes_ = std::move(larger);
}

void MessageBuffer::charge(std::size_t more) { bytes_.lease.grow_or_throw(more); }

void MessageBuffer::append(ByteSpan bytes) {
  charge(bytes.size());
  copy_bytes(room().data(), bytes.data(), bytes.size());
  filled(bytes.size());
}

Bytes MessageBuffer::release() {
  bytes_.shrink(size_);
  size_ = 0;
  return std::exchange(bytes_, Bytes());
}

}  // namespace attnserve::grpc
