#include "grpc/message_reader.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/status.h"
#include "base/text.h"

namespace attnserve::grpc {

namespace {

// Room is made for so many times what has come, so that announcing much without sending it holds
// little even where room costs memory (pinned memory does).
constexpr std::size_t kRoomAhead = 16;
constexpr std::size_t kLeastRoom = 16U << 10;

}  // namespace

MessageReader::MessageReader(ByteBudget& budget, std::size_t max_message_bytes, Encoding encoding)
    : budget_(&budget),
      max_message_bytes_(max_message_bytes),
      encoding_(encoding),
      buffer_(budget) {}

std::optional<Bytes> MessageReader::next(ByteSpan& bytes) {
  if (prefix_size_ < kPrefixBytes) {
    take_prefix(bytes);
    if (prefix_size_ < kPrefixBytes) return std::nullopt;
    begin();
  }
  const ByteSpan part = bytes.first(std::min(bytes.size(), announced_ - received_));
  if (!part.empty()) {
    if (inflater_) {
      inflater_->take(part, buffer_);
    } else {
      make_room(part.size());
      buffer_.append(part);
    }
    received_ += part.size();
    bytes = bytes.subspan(part.size());
  }
  if (received_ < announced_) return std::nullopt;
  return finish();
}

void MessageReader::take_prefix(ByteSpan& bytes) {
  const std::size_t size = std::min(bytes.size(), kPrefixBytes - prefix_size_);
  std::copy_n(bytes.begin(), size, prefix_.begin() + prefix_size_);
  prefix_size_ += size;
  bytes = bytes.subspan(size);
}

void MessageReader::begin() {
  announced_ = 0;
  for (std::size_t i = 1; i < kPrefixBytes; ++i) {
    announced_ = announced_ << 8U | std::to_integer<std::size_t>(prefix_[i]);
  }
  const auto flag = std::to_integer<unsigned>(prefix_[0]);
  if (flag > 1) {
    throw RequestError(Code::kInternal, text("message: given the flag ", flag, "; allowed: 0, 1"));
  }
  if (announced_ > max_message_bytes_) {
    throw RequestError(
        Code::kResourceExhausted,
        text("Received message larger than max (", announced_, " vs. ", max_message_bytes_, ")"));
  }
  if (flag == 1) {
    if (encoding_ == Encoding::kIdentity) {
      throw RequestError(
          Code::kInternal,
          "message: given a compressed one; allowed: those that grpc-encoding names");
    }
    inflater_ = std::make_unique<Inflater>(encoding_, *budget_, max_message_bytes_);
  }
}

// One allocation if the message is short or most of it is here; else one more, early, when little
// is to be moved.
void MessageReader::make_room(std::size_t coming) {
  if (buffer_.capacity() == announced_) return;
  const std::size_t come = buffer_.size() + coming;
  const std::size_t allowed = std::min(announced_, std::max(kLeastRoom, kRoomAhead * come));
  if (come > buffer_.capacity() || allowed == announced_) buffer_.reserve(allowed);
}

Bytes MessageReader::finish() {
  if (inflater_ && !inflater_->ended()) {
    throw RequestError(Code::kInternal, "message: its compressed stream does not end with it");
  }
  inflater_.reset();
  prefix_size_ = 0;
  received_ = 0;
  return buffer_.release();
}

}  // namespace attnserve::grpc
