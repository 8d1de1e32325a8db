#include "wire/layout.h"

#include <cstring>

namespace attnserve::wire {

namespace {

constexpr std::uint32_t kLengthDelimited = 2;

std::uint32_t tag_of(std::uint32_t number) { return number << 3 | kLengthDelimited; }

}  // namespace

void append_length(std::string& to, std::uint32_t number, std::uint64_t size) {
  protozero::add_varint_to_buffer(&to, tag_of(number));
  protozero::add_varint_to_buffer(&to, size);
}

std::size_t tag_bytes(std::uint32_t number) { return varint_bytes(tag_of(number)); }

std::size_t length_bytes(std::uint32_t number, std::uint64_t size) {
  return tag_bytes(number) + varint_bytes(size);
}

void append_padding(std::string& to, std::uint32_t number, std::size_t size) {
  const std::size_t zeros = size - least_padding(number);
  append_length(to, number, zeros);
  to.append(zeros, '\0');
}

std::size_t least_padding(std::uint32_t number) { return length_bytes(number, 0); }

std::size_t padding_of(std::size_t at, std::uint32_t number) {
  const std::size_t missing = (kAlignment - at % kAlignment) % kAlignment;
  return missing == 0 || missing >= least_padding(number) ? missing : missing + kAlignment;
}

void add_text(protozero::pbf_writer& writer, std::uint32_t number, std::string_view text) {
  if (!text.empty()) writer.add_string(number, view_of(text));
}

Bytes bytes_of(std::string_view message) {
  Bytes bytes = Bytes::allocate(message.size());
  if (!message.empty()) std::memcpy(bytes.data(), message.data(), message.size());
  return bytes;
}

void Frame::add_room(std::string_view header, std::size_t size) {
  const std::size_t padding = padding_of(this->size() + header.size(), padding_);
  if (padding != 0) append_padding(text_, padding_, padding);
  text_ += header;
  rooms_.push_back({text_.size(), size});
  elements_ += size;
}

Bytes Frame::write(std::vector<std::byte*>& places) const {
  Bytes message = Bytes::allocate(size());
  std::byte* to = message.data();
  std::size_t from = 0;
  const auto copy_until = [&](std::size_t end) {
    if (end != from) std::memcpy(to, text_.data() + from, end - from);
    to += end - from;
    from = end;
  };
  for (const Room& room : rooms_) {
    copy_until(room.at);
    places.push_back(to);
    to += room.size;
  }
  copy_until(text_.size());
  return message;
}

}  // namespace attnserve::wire
