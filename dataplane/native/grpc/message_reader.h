// Length-prefixed messages out of the bytes of a stream, wherever DATA frames cut them.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <optional>

#include "base/memory.h"
#include "grpc/headers.h"
#include "grpc/inflater.h"
#include "grpc/message_buffer.h"

namespace attnserve::grpc {

constexpr std::size_t kPrefixBytes = 5;  // a flag and four bytes of length, most significant first
constexpr std::size_t kUnknownSize = 64U << 10;  // what a message is taken for before its prefix

// Errors are RequestError: RESOURCE_EXHAUSTED for messages larger than allowed (known from the
// prefix, unread), for a budget or memory that has no more; INTERNAL for what breaks the format.
// After an error it is of no more use.
class MessageReader {
 public:
  MessageReader(ByteBudget& budget, std::size_t max_message_bytes, Encoding encoding);

  // Takes bytes from the front of `bytes`, up to the end of one message: that message if it is
  // whole, nothing if all bytes were taken before its end.
  std::optional<Bytes> next(ByteSpan& bytes);

  bool under_way() const { return prefix_size_ > 0; }  // a message has begun and not ended
  // Bytes that are missing of it; a guess while its size has not come.
  std::size_t missing() const {
    return prefix_size_ < kPrefixBytes ? kUnknownSize : announced_ - received_;
  }

 private:
  void take_prefix(ByteSpan& bytes);
  void begin();
  void make_room(std::size_t coming);
  Bytes finish();

  ByteBudget* budget_;
  std::size_t max_message_bytes_;
  Encoding encoding_;

  std::array<std::byte, kPrefixBytes> prefix_;
  std::size_t prefix_size_ = 0;
  std::size_t announced_ = 0;  // by the prefix
  std::size_t received_ = 0;   // of them
  MessageBuffer buffer_;
  std::unique_ptr<Inflater> inflater_;  // of a compressed message
};

}  // namespace attnserve::grpc
