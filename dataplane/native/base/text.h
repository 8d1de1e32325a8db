// Putting messages together; numbers and lists are written as Python writes them, since that is how
// callers have always read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

namespace attnserve {

std::string number_text(double value);                        // 2.0, 1e+20, nan, inf: Python's repr
std::string list_text(std::span<const std::int64_t> values);  // [1, 2, 3]

// Python's repr of a str: in single quotes, or in double ones where that saves escapes. What is not
// printable is escaped, bytes that are not UTF-8 each as \xNN.
std::string quoted(std::string_view text);

// One character of UTF-8; a byte that is part of none counts as one that is not valid.
struct Character {
  std::uint32_t point = 0;  // the code point, or the byte
  std::size_t bytes = 1;
  bool valid = false;
};
Character character_at(std::string_view text, std::size_t at);  // at < text.size()

// The beginning of a text: as many characters as asked for, whole ones; all of it if it has fewer.
std::string_view first_characters(std::string_view text, std::size_t count);

namespace detail {
inline void append(std::string& to, std::string_view part) { to += part; }
inline void append(std::string& to, const char* part) { to += part; }
inline void append(std::string& to, const std::string& part) { to += part; }
inline void append(std::string& to, char part) { to += part; }
template <class T>
  requires std::is_integral_v<T>
void append(std::string& to, T part) {
  to += std::to_string(part);
}
inline void append(std::string& to, double part) { to += number_text(part); }
inline void append(std::string& to, std::span<const std::int64_t> part) { to += list_text(part); }
}  // namespace detail

// text("Sk=", 3, " of ", shape): all parts, one after another.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::string whole;
  (detail::append(whole, parts), ...);
  return whole;
}

}  // namespace attnserve
