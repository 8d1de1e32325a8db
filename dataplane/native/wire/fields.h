// The fields of a message one after another, as protobuf reads them: what it accepts is accepted,
// what it refuses is refused. (https://protobuf.dev/programming-guides/encoding/)
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "wire/attention.h"

namespace attnserve::wire {

// What a field is told apart by: its number and its wire type. One of a wire type that the .proto
// does not give it counts as unknown, which a switch over these does by itself.
constexpr std::uint32_t varint_field(std::uint32_t number) { return number << 3 | 0; }
constexpr std::uint32_t fixed64_field(std::uint32_t number) { return number << 3 | 1; }
constexpr std::uint32_t bytes_field(std::uint32_t number) { return number << 3 | 2; }
constexpr std::uint32_t fixed32_field(std::uint32_t number) { return number << 3 | 5; }

// A set of field numbers below 32.
constexpr std::uint32_t numbers(std::initializer_list<std::uint32_t> each) {
  std::uint32_t set = 0;
  for (const std::uint32_t number : each) set |= 1U << number;
  return set;
}

// What the readers of one message and of those within it share.
class Decoding {
 public:
  explicit Decoding(std::string_view method, DecodeLimits limits = {})
      : method_(method), max_fields_(limits.max_fields) {}

  // Takes note of one more field; throws once there are too many.
  void count_field() {
    if (++fields_ > max_fields_) refuse_count();
  }
  // Likewise of one more number of a packed field, which takes more memory than on the wire.
  void count_packed(std::string_view too_many) {
    if (++packed_ > kMostPacked) refuse(too_many);
  }
  // Throws the RequestError of all decode functions.
  [[noreturn]] void refuse(std::string_view reason) const;

 private:
  [[noreturn]] void refuse_count() const;

  static constexpr std::size_t kMostPacked = 1U << 18;

  std::string_view method_;
  std::size_t max_fields_;
  std::size_t fields_ = 0;
  std::size_t packed_ = 0;
};

// Numbers one after another: the elements of a packed field, or the pieces that fields consist of.
class Numbers {
 public:
  Numbers(ByteSpan bytes, const Decoding& decoding);

  bool empty() const { return at_ == end_; }
  std::uint64_t varint() {  // at most ten bytes
    if (at_ != end_ && (*at_ & '\x80') == 0) return static_cast<unsigned char>(*at_++);
    return long_varint();
  }
  std::uint32_t tag();  // at most five
  ByteSpan bytes();     // a length of at most five bytes, and so many bytes
  template <class T>
  T fixed();  // std::uint32_t or std::uint64_t

 private:
  std::uint64_t long_varint();
  ByteSpan take(std::size_t size);

  const char* at_;
  const char* end_;
  const Decoding* decoding_;
};

// while (reader.next()) switch (reader.key()) { case varint_field(1): ... = reader.number(); ... }
// Groups, which no message here has, are skipped.
class FieldReader {
 public:
  // `uncounted`: numbers of fields that do not count against DecodeLimits.
  FieldReader(ByteSpan message, Decoding& decoding, std::uint32_t uncounted = 0)
      : FieldReader(message, decoding, uncounted, 0) {}

  bool next();
  std::uint32_t key() const { return key_; }
  // The value, by wire type.
  std::uint64_t number() const { return number_; }  // varint, fixed32 or fixed64
  bool flag() const { return number_ != 0; }
  std::uint32_t number32() const { return static_cast<std::uint32_t>(number_); }
  ByteSpan bytes() const { return bytes_; }
  std::string_view text() const;  // refused if it is not UTF-8
  Numbers packed() const { return {bytes_, *decoding_}; }
  FieldReader message(std::uint32_t uncounted = 0) const {
    return {bytes_, *decoding_, uncounted, depth_ + 1};
  }
  Decoding& decoding() const { return *decoding_; }

 private:
  FieldReader(ByteSpan message, Decoding& decoding, std::uint32_t uncounted, std::size_t depth);
  void count(std::uint32_t number);
  void read_value();
  void skip_group();

  Numbers rest_;
  Decoding* decoding_;
  std::uint32_t uncounted_;
  std::size_t depth_;  // of this message within others
  std::uint32_t key_ = 0;
  std::uint64_t number_ = 0;
  ByteSpan bytes_;
};

// Appends the numbers of a packed field; how many a message may have is bounded, but they do not
// count as fields. `too_many` says what they are, for the refusal.
template <class T>
void append_packed(const FieldReader& reader, std::string_view too_many, std::vector<T>& to) {
  for (Numbers rest = reader.packed(); !rest.empty();) {
    reader.decoding().count_packed(too_many);
    to.push_back(static_cast<T>(rest.varint()));
  }
}

bool is_utf8(std::string_view text);
// A text with everything in it that is not UTF-8 replaced by question marks.
std::string as_utf8(std::string_view text);

inline std::string_view as_text(ByteSpan bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace attnserve::wire
