#include "base/trace_context.h"

#include <algorithm>
#include <span>

namespace attnserve {

namespace {

constexpr std::size_t kTraceparent = 55;  // 00-{32 digits}-{16 digits}-{2 digits}
constexpr std::size_t kMostMembers = 32;
constexpr std::size_t kMostKey = 256, kMostTenant = 241, kMostSystem = 14, kMostValue = 256;

thread_local const TraceContext* current_context = nullptr;

int digit_of(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
  return -1;
}

// Two digits a byte; false: some are none.
bool read_hex(std::string_view digits, std::span<std::uint8_t> bytes) {
  for (std::size_t index = 0; index < bytes.size(); ++index) {
    const int high = digit_of(digits[2 * index]);
    const int low = digit_of(digits[2 * index + 1]);
    if (high < 0 || low < 0) return false;
    bytes[index] = static_cast<std::uint8_t>(high << 4 | low);
  }
  return true;
}

bool is_zero(std::span<const std::uint8_t> bytes) {
  return std::ranges::all_of(bytes, [](std::uint8_t byte) { return byte == 0; });
}

bool is_letter(char byte) { return byte >= 'a' && byte <= 'z'; }
bool is_digit(char byte) { return byte >= '0' && byte <= '9'; }
bool is_key_character(char byte) {
  return is_letter(byte) || is_digit(byte) || byte == '_' || byte == '-' || byte == '*' ||
         byte == '/';
}

bool is_key_part(std::string_view part, std::size_t most, bool digit_first) {
  return !part.empty() && part.size() <= most &&
         (is_letter(part.front()) || (digit_first && is_digit(part.front()))) &&
         std::ranges::all_of(part, is_key_character);
}

bool is_key(std::string_view key) {
  const std::size_t at = key.find('@');
  if (at == std::string_view::npos) return is_key_part(key, kMostKey, false);
  return is_key_part(key.substr(0, at), kMostTenant, true) &&
         is_key_part(key.substr(at + 1), kMostSystem, false);
}

bool is_value(std::string_view value) {
  return !value.empty() && value.size() <= kMostValue && value.back() != ' ' &&
         std::ranges::all_of(value, [](char byte) {
           return byte >= ' ' && byte <= '~' && byte != ',' && byte != '=';
         });
}

std::string_view trimmed(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

std::string hex_text(std::span<const std::uint8_t> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * bytes.size());
  for (const std::uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace

std::optional<TraceContext> parse_traceparent(std::string_view value) {
  if (value.size() < kTraceparent) return std::nullopt;
  std::array<std::uint8_t, 1> version{}, flags{};
  if (!read_hex(value.substr(0, 2), version) || version[0] == 0xFF) return std::nullopt;
  if (value.size() > kTraceparent && (version[0] == 0 || value[kTraceparent] != '-')) {
    return std::nullopt;
  }
  if (value[2] != '-' || value[35] != '-' || value[52] != '-') return std::nullopt;
  TraceContext context;
  if (!read_hex(value.substr(3, 32), context.trace_id) ||
      !read_hex(value.substr(36, 16), context.span_id) || !read_hex(value.substr(53, 2), flags) ||
      is_zero(context.trace_id) || is_zero(context.span_id)) {
    return std::nullopt;
  }
  context.sampled = (flags[0] & 1) != 0;  // what other bits mean is not known yet
  return context;
}

bool is_tracestate(std::string_view value) {
  std::array<std::string_view, kMostMembers> keys;
  std::size_t count = 0;
  for (bool more = true; more;) {
    const std::size_t comma = value.find(',');
    more = comma != std::string_view::npos;
    const std::string_view member = trimmed(value.substr(0, comma));
    if (more) value.remove_prefix(comma + 1);
    if (member.empty()) continue;
    const std::size_t equals = member.find('=');
    if (equals == std::string_view::npos || count == kMostMembers) return false;
    const std::string_view key = member.substr(0, equals);
    if (!is_key(key) || !is_value(member.substr(equals + 1))) return false;
    const auto known = std::span(keys).first(count);
    if (std::ranges::find(known, key) != known.end()) return false;
    keys[count++] = key;
  }
  return count > 0;
}

std::string hex_of(const std::array<std::uint8_t, 16>& id) { return hex_text(id); }
std::string hex_of(const std::array<std::uint8_t, 8>& id) { return hex_text(id); }

TraceScope::TraceScope(const TraceContext& context) : outer_(current_context) {
  current_context = context.present() ? &context : nullptr;
}

TraceScope::~TraceScope() { current_context = outer_; }

const TraceContext* TraceScope::current() { return current_context; }

}  // namespace attnserve
