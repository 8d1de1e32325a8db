#include "base/text.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

namespace attnserve {

namespace {

struct Range {
  std::uint32_t first, last;
};

// Characters beyond ASCII that Unicode 14 calls controls, formats, private ones or separators. They
// are the ones that could disguise a message; characters that are not assigned yet are left alone.
constexpr std::array kNotPrintable = std::to_array<Range>({
    {0x80, 0xA0},       {0xAD, 0xAD},       {0x600, 0x605},       {0x61C, 0x61C},
    {0x6DD, 0x6DD},     {0x70F, 0x70F},     {0x890, 0x891},       {0x8E2, 0x8E2},
    {0x1680, 0x1680},   {0x180E, 0x180E},   {0x2000, 0x200F},     {0x2028, 0x202F},
    {0x205F, 0x2064},   {0x2066, 0x206F},   {0x3000, 0x3000},     {0xD800, 0xF8FF},
    {0xFEFF, 0xFEFF},   {0xFFF9, 0xFFFB},   {0x110BD, 0x110BD},   {0x110CD, 0x110CD},
    {0x13430, 0x13438}, {0x1BCA0, 0x1BCA3}, {0x1D173, 0x1D17A},   {0xE0001, 0xE0001},
    {0xE0020, 0xE007F}, {0xF0000, 0xFFFFD}, {0x100000, 0x10FFFD},
});

bool printable(std::uint32_t point) {
  if (point < 0x80) return point >= 0x20 && point != 0x7F;
  const auto* range = std::ranges::lower_bound(kNotPrintable, point, {}, &Range::last);
  return range == kNotPrintable.end() || point < range->first;
}

void append_escape(std::string& to, std::uint32_t point) {
  char digits[11];
  const char* form = point <= 0xFF ? "\\x%02x" : point <= 0xFFFF ? "\\u%04x" : "\\U%08x";
  std::snprintf(digits, sizeof digits, form, point);
  to += digits;
}

}  // namespace

std::string number_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  // The shortest digits that read back as the same number: "-d.ddde+XX".
  std::array<char, 32> buffer;
  const auto written = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                     std::chars_format::scientific);
  std::string_view shortest(buffer.data(), static_cast<std::size_t>(written.ptr - buffer.data()));
  std::string whole;
  if (shortest.front() == '-') {
    whole += '-';
    shortest.remove_prefix(1);
  }
  const std::size_t mark = shortest.find('e');
  int exponent = 0;
  const char* first = shortest.data() + mark + 1;
  if (*first == '+') ++first;
  std::from_chars(first, shortest.data() + shortest.size(), exponent);
  std::string digits(1, shortest.front());
  if (mark > 1) digits += shortest.substr(2, mark - 2);

  // Python writes the point where it belongs from 1e-4 up to 1e16, and an exponent elsewhere.
  const int count = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    whole += digits.front();
    if (count > 1) whole.append(".").append(digits, 1);
    char power[8];
    std::snprintf(power, sizeof power, "e%+03d", exponent);
    return whole += power;
  }
  if (exponent < 0) {
    return whole.append("0.").append(static_cast<std::size_t>(-exponent - 1), '0').append(digits);
  }
  if (count <= exponent + 1) {
    return whole.append(digits).append(static_cast<std::size_t>(exponent + 1 - count), '0') += ".0";
  }
  return whole.append(digits, 0, static_cast<std::size_t>(exponent + 1))
      .append(".")
      .append(digits, static_cast<std::size_t>(exponent + 1));
}

std::string list_text(std::span<const std::int64_t> values) {
  std::string whole = "[";
  for (const std::int64_t value : values) {
    if (whole.size() > 1) whole += ", ";
    whole += std::to_string(value);
  }
  return whole += ']';
}

std::string quoted(std::string_view text) {
  const bool doubled =
      text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
  const char quote = doubled ? '"' : '\'';
  std::string whole(1, quote);
  for (std::size_t at = 0; at < text.size();) {
    const Character character = character_at(text, at);
    const std::uint32_t point = character.point;
    if (!character.valid) {
      append_escape(whole, point);
    } else if (point == static_cast<unsigned char>(quote) || point == '\\') {
      whole += '\\';
      whole += static_cast<char>(point);
    } else if (point == '\n') {
      whole += "\\n";
    } else if (point == '\r') {
      whole += "\\r";
    } else if (point == '\t') {
      whole += "\\t";
    } else if (printable(point)) {
      whole += text.substr(at, character.bytes);
    } else {
      append_escape(whole, point);
    }
    at += character.bytes;
  }
  return whole += quote;
}

Character character_at(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t index) -> std::uint32_t {
    return static_cast<unsigned char>(text[at + index]);
  };
  const std::uint32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true};
  const std::size_t bytes = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  // Smaller code points have shorter forms, which are the only ones allowed.
  constexpr std::array<std::uint32_t, 5> kSmallest{0, 0, 0x80, 0x800, 0x10000};
  if (lead < 0xC2 || lead > 0xF4 || text.size() - at < bytes) return {lead, 1, false};
  std::uint32_t point = lead & (0xFFU >> (bytes + 1));
  for (std::size_t index = 1; index < bytes; ++index) {
    if ((byte(index) & 0xC0) != 0x80) return {lead, 1, false};
    point = point << 6 | (byte(index) & 0x3F);
  }
  const bool surrogate = point >= 0xD800 && point <= 0xDFFF;
  if (point < kSmallest[bytes] || point > 0x10FFFF || surrogate) return {lead, 1, false};
  return {point, bytes, true};
}

std::string_view first_characters(std::string_view text, std::size_t count) {
  if (text.size() <= count) return text;
  std::size_t at = 0;
  for (; count > 0 && at < text.size(); --count) at += character_at(text, at).bytes;
  return text.substr(0, at);
}

}  // namespace attnserve
