#include "wire/fields.h"

#include <array>
#include <cstring>
#include <limits>
#include <protozero/exception.hpp>
#include <protozero/varint.hpp>

#include "base/text.h"

namespace attnserve::wire {

namespace {

constexpr std::uint32_t kVarint = 0, kFixed64 = 1, kBytes = 2, kGroup = 3, kGroupEnd = 4,
                        kFixed32 = 5;
constexpr std::size_t kMostShortBytes = 5;  // of a tag or a length
// Messages and groups within one another, as protobuf allows them.
constexpr std::size_t kMostDepth = 100;
// Lengths from here on are refused by protobuf, so that it can compute with 32 bits.
constexpr std::uint64_t kMostLength = std::numeric_limits<std::int32_t>::max() - 16;

}  // namespace

void Decoding::refuse(std::string_view reason) const {
  throw RequestError(invalid_argument(
      "message", attnserve::text("bytes that are not the request of ", method_, " (", reason, ")"),
      "the message that its .proto file describes"));
}

void Decoding::refuse_count() const {
  refuse(attnserve::text("more than ", max_fields_, " fields"));
}

Numbers::Numbers(ByteSpan bytes, const Decoding& decoding)
    : at_(reinterpret_cast<const char*>(bytes.data())),
      end_(at_ + bytes.size()),
      decoding_(&decoding) {}

std::uint64_t Numbers::long_varint() {
  try {
    return protozero::decode_varint(&at_, end_);
  } catch (const protozero::varint_too_long_exception&) {
    decoding_->refuse("a number of more than 10 bytes");
  } catch (const protozero::end_of_buffer_exception&) {
    decoding_->refuse("a number that is cut off");
  }
}

std::uint32_t Numbers::tag() {
  const char* start = at_;
  const std::uint64_t value = varint();
  if (static_cast<std::size_t>(at_ - start) > kMostShortBytes) {
    decoding_->refuse("a tag of more than 5 bytes");
  }
  // As protobuf's upb does, which the control plane's methods read with; its C++ library loses
  // bits.
  if (value > std::numeric_limits<std::uint32_t>::max()) {
    decoding_->refuse("a tag of more than 32 bits");
  }
  return static_cast<std::uint32_t>(value);
}

ByteSpan Numbers::bytes() {
  const char* start = at_;
  const std::uint64_t size = varint();
  if (static_cast<std::size_t>(at_ - start) > kMostShortBytes || size > kMostLength) {
    decoding_->refuse("a length of 2 GiB or more");
  }
  return take(size);
}

template <class T>
T Numbers::fixed() {
  T value;  // little-endian, as the machines are that this runs on
  std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
  return value;
}

template std::uint32_t Numbers::fixed();
template std::uint64_t Numbers::fixed();

ByteSpan Numbers::take(std::size_t size) {
  if (static_cast<std::size_t>(end_ - at_) < size) decoding_->refuse("a field that is cut off");
  const ByteSpan taken{reinterpret_cast<const std::byte*>(at_), size};
  at_ += size;
  return taken;
}

FieldReader::FieldReader(ByteSpan message, Decoding& decoding, std::uint32_t uncounted,
                         std::size_t depth)
    : rest_(message, decoding), decoding_(&decoding), uncounted_(uncounted), depth_(depth) {
  if (message.size() > kMostLength) decoding.refuse("a message of 2 GiB or more");
}

bool FieldReader::next() {
  while (!rest_.empty()) {
    key_ = rest_.tag();
    count(key_ >> 3);
    if ((key_ & 7) != kGroup) {
      read_value();
      return true;
    }
    skip_group();
  }
  return false;
}

std::string_view FieldReader::text() const {
  const std::string_view text = as_text(bytes_);
  if (!is_utf8(text)) {
    decoding_->refuse(attnserve::text("field ", key_ >> 3, ", a text, is not UTF-8"));
  }
  return text;
}

void FieldReader::count(std::uint32_t number) {
  if (number == 0) decoding_->refuse("a field of number 0");
  if (number < 32 && (uncounted_ >> number & 1) != 0) return;
  decoding_->count_field();
}

void FieldReader::read_value() {
  switch (key_ & 7) {
    case kVarint:
      number_ = rest_.varint();
      return;
    case kFixed64:
      number_ = rest_.fixed<std::uint64_t>();
      return;
    case kBytes:
      bytes_ = rest_.bytes();
      return;
    case kFixed32:
      number_ = rest_.fixed<std::uint32_t>();
      return;
    default:
      decoding_->refuse(attnserve::text("field ", key_ >> 3, " is of wire type ", key_ & 7));
  }
}

void FieldReader::skip_group() {
  // The numbers of the groups that are open. Each ends with its own, the innermost first.
  std::array<std::uint32_t, kMostDepth> open;
  std::size_t depth = 0;
  do {
    const std::uint32_t number = key_ >> 3;
    if ((key_ & 7) == kGroup) {
      if (depth_ + depth == kMostDepth) decoding_->refuse("groups too deep within one another");
      open[depth++] = number;
    } else if ((key_ & 7) == kGroupEnd) {
      if (open[depth - 1] != number) decoding_->refuse("a group that ends as another one");
      if (--depth == 0) return;
    } else {
      read_value();
    }
    if (rest_.empty()) decoding_->refuse("a group that is cut off");
    key_ = rest_.tag();
    count(key_ >> 3);
  } while (true);
}

bool is_utf8(std::string_view text) {
  constexpr std::uint64_t kHighBits = 0x8080808080808080;
  std::size_t at = 0;
  while (at < text.size()) {
    std::uint64_t eight = 0;
    if (text.size() - at >= sizeof(eight)) {
      std::memcpy(&eight, text.data() + at, sizeof(eight));
      if ((eight & kHighBits) == 0) {
        at += sizeof(eight);
        continue;
      }
    }
    const Character character = character_at(text, at);
    if (!character.valid) return false;
    at += character.bytes;
  }
  return true;
}

std::string as_utf8(std::string_view text) {
  std::string valid;
  valid.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const Character character = character_at(text, at);
    if (character.valid) {
      valid += text.substr(at, character.bytes);
    } else {
      valid += '?';
    }
    at += character.bytes;
  }
  return valid;
}

}  // namespace attnserve::wire
