// Memory that a message grows in while it comes.
#pragma once

#include <cstddef>

#include "base/memory.h"

namespace attnserve::grpc {

// Room for bytes, of which those that have come are charged to a budget; room alone costs nothing,
// since memory that nobody has written to takes none. Errors are RequestError RESOURCE_EXHAUSTED.
class MessageBuffer {
 public:
  explicit MessageBuffer(ByteBudget& budget) : budget_(&budget) {}

  std::size_t size() const { return size_; }  // bytes that have come
  std::size_t capacity() const { return bytes_.size(); }
  MutableByteSpan room() { return bytes_.span().subspan(size_); }
  ByteSpan contents() const { return bytes_.span().first(size_); }

  // Moves what has come to room for `capacity` bytes, which is more than there was.
  void reserve(std::size_t capacity);
  void charge(std::size_t more);                    // before or just after they are written
  void filled(std::size_t more) { size_ += more; }  // the first bytes of `room` were written
  void append(ByteSpan bytes);                      // charges and copies; they fit
  // All that has come, with its charge; the buffer is empty again.
  Bytes release();

 private:
  ByteBudget* budget_;
  Bytes bytes_;
  std::size_t size_ = 0;
};

}  // namespace attnserve::grpc
