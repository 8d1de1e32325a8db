// Messages laid out before the elements of their tensors are computed, so that these are computed
// where they are sent from.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <protozero/pbf_writer.hpp>
#include <protozero/varint.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/memory.h"

namespace attnserve::wire {

inline std::size_t varint_bytes(std::uint64_t value) {
  return static_cast<std::size_t>(protozero::length_of_varint(value));
}

// Tag and length of a field of `size` bytes that follow.
void append_length(std::string& to, std::uint32_t number, std::uint64_t size);
std::size_t length_bytes(std::uint32_t number, std::uint64_t size);  // that append_length appends
std::size_t tag_bytes(std::uint32_t number);                         // of which the tag takes these

// A `bytes` field of zeros that takes `size` bytes as a whole: at least least_padding(number), and
// at most 127 more than its tag and length.
void append_padding(std::string& to, std::uint32_t number, std::size_t size);
std::size_t least_padding(std::uint32_t number);
// The padding after which what lies at `at` lies at a multiple of kAlignment; 0: none is needed.
std::size_t padding_of(std::size_t at, std::uint32_t number);

// Proto3: a text that is empty is left out.
void add_text(protozero::pbf_writer& writer, std::uint32_t number, std::string_view text);
inline protozero::data_view view_of(std::string_view text) { return {text.data(), text.size()}; }

Bytes bytes_of(std::string_view message);

// A message but for the elements of its tensors, with room for those.
class Frame {
 public:
  // `padding`: the number of a field that readers ignore. `before`: bytes that the message begins
  // with and that are set at the end, by `begin_with`.
  Frame(std::uint32_t padding, std::size_t before) : padding_(padding), text_(before, '\0') {}

  // What comes next; to be appended to.
  std::string& text() { return text_; }
  // Room for `size` bytes after `header`, which comes next; at a multiple of kAlignment.
  void add_room(std::string_view header, std::size_t size);
  void begin_with(std::string_view before) { text_.replace(0, before.size(), before); }
  std::size_t size() const { return text_.size() + elements_; }
  std::uint32_t padding() const { return padding_; }

  // The message; `places[i]` becomes where the elements of the i-th room go.
  Bytes write(std::vector<std::byte*>& places) const;

 private:
  struct Room {
    std::size_t at;  // in text_: what is before it
    std::size_t size;
  };

  std::uint32_t padding_;
  std::string text_;         // everything but elements, in order
  std::vector<Room> rooms_;  // in order
  std::size_t elements_ = 0;
};

// Lays out a message within another one, as its field `number`, after `before`. How many bytes its
// length takes depends on the paddings in it, and those on how many bytes are before it: so it is
// laid out for each number of bytes until one fits. `lay_out(size)` gives it with room for `size`
// bytes before it; `elements`: bytes that it takes at least.
template <class LayOut>
Frame enclose(std::string before, std::uint32_t number, std::size_t elements, LayOut lay_out) {
  for (std::size_t width = varint_bytes(elements);; ++width) {
    const std::size_t outside = before.size() + tag_bytes(number) + width;
    Frame frame = lay_out(outside);
    const std::size_t inside = frame.size() - outside;
    if (varint_bytes(inside) > width) continue;
    if (varint_bytes(inside) < width) {
      // With one byte more before it, it needs less padding, and then one byte less for its length.
      const std::size_t missing = (std::size_t{1} << 7 * (width - 1)) - inside;
      append_padding(frame.text(), frame.padding(),
                     std::max(missing, least_padding(frame.padding())));
    }
    append_length(before, number, frame.size() - outside);
    frame.begin_with(before);
    return frame;
  }
}

}  // namespace attnserve::wire
