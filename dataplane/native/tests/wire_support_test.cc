#include "wire_support.h"

#include <algorithm>
#include <array>
#include <ctime>
#include <limits>

namespace attnserve::wire::tests {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;

namespace {

constexpr std::uint32_t kVarint = 0, kFixed64 = 1, kBytes = 2, kGroup = 3, kGroupEnd = 4,
                        kFixed32 = 5;

std::uint32_t wire_type_of(const FieldDescriptor& field) {
  switch (field.type()) {
    case FieldDescriptor::TYPE_DOUBLE:
      return kFixed64;
    case FieldDescriptor::TYPE_FLOAT:
      return kFixed32;
    case FieldDescriptor::TYPE_STRING:
    case FieldDescriptor::TYPE_BYTES:
    case FieldDescriptor::TYPE_MESSAGE:
      return kBytes;
    default:
      return kVarint;
  }
}

}  // namespace

std::string hex(std::string_view message) {
  std::string text;
  for (const char c : message) {
    constexpr std::string_view kDigits = "0123456789abcdef";
    text += kDigits[static_cast<unsigned char>(c) >> 4];
    text += kDigits[static_cast<unsigned char>(c) & 15];
  }
  return text;
}

void append_varint(std::string& to, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) to += static_cast<char>(value | 0x80);
  to += static_cast<char>(value);
}

std::string field(std::uint32_t number, std::string_view body) {
  std::string message;
  append_varint(message, number << 3 | kBytes);
  append_varint(message, body.size());
  return message.append(body);
}

std::string repeated(std::string_view part, std::size_t bytes) {
  std::string whole;
  while (whole.size() < bytes) whole += part;
  return whole;
}

double processor_seconds_of(const std::function<void()>& work) {
  const auto now = [] {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
  };
  double least = std::numeric_limits<double>::infinity();
  for (int run = 0; run < 5; ++run) {
    const double start = now();
    work();
    least = std::min(least, now() - start);
  }
  return least;
}

void check_ends_early(std::string_view part, const std::function<void(const std::string&)>& work,
                      const std::vector<std::uint32_t>& within) {
  std::string large = repeated(part, kLarge), small = repeated(part, kSmall);
  for (const std::uint32_t number : within) {
    large = field(number, large);
    small = field(number, small);
  }
  CHECK(processor_seconds_of([&] { work(large); }) <
        16 * processor_seconds_of([&] { work(small); }));
}

void check_in_proportion(std::string_view part,
                         const std::function<void(const std::string&)>& work) {
  const std::string large = repeated(part, kLarge / 2), small = repeated(part, kLarge / 16);
  CHECK(processor_seconds_of([&] { work(large); }) <
        24 * processor_seconds_of([&] { work(small); }));
}

std::string refusal(const std::function<void()>& decode) {
  try {
    decode();
  } catch (const RequestError& error) {
    CHECK(error.status().code == Code::kInvalidArgument);
    return error.status().message;
  }
  return "";
}

std::string RandomWire::message(const Descriptor& type, int depth) {
  std::string message;
  for (std::uint64_t left = below(depth == 0 ? 12 : 5); left > 0; --left) {
    if (type.field_count() == 0 || one_in(12)) {
      unknown(depth, message);
    } else {
      field(*type.field(static_cast<int>(below(type.field_count()))), depth, message);
    }
  }
  return message;
}

std::string RandomWire::mutated(std::string message) {
  for (std::uint64_t left = 1 + below(3); left > 0; --left) {
    const std::size_t at = below(message.size() + 1);
    switch (below(message.empty() ? 1 : 6)) {
      case 0:
        message.insert(at, 1, static_cast<char>(below(256)));
        break;
      case 1:
        message.resize(at);
        break;
      case 2:
        message.erase(at, 1 + below(4));
        break;
      case 3:
        message.insert(at, message.substr(below(message.size()), below(16)));
        break;
      case 4:
        message[at % message.size()] = static_cast<char>(below(256));
        break;
      default:
        message[at % message.size()] ^= static_cast<char>(1 << below(8));
    }
  }
  return message;
}

void RandomWire::field(const FieldDescriptor& field, int depth, std::string& to) {
  const std::uint32_t wire_type = wire_type_of(field);
  const auto number = static_cast<std::uint32_t>(field.number());
  if (one_in(30)) {  // of a wire type that is not the field's
    const bool half = one_in(2);
    tag(number, half ? kFixed32 : kFixed64, to);
    to.append(half ? 4 : 8, '\1');
    return;
  }
  if (field.is_packable() && one_in(2)) {
    std::string elements;
    for (std::uint64_t left = below(6); left > 0; --left) elements += value(field, depth);
    embedded(number, elements, to);
    return;
  }
  if (wire_type == kBytes) {
    embedded(number, value(field, depth), to);
    return;
  }
  tag(number, wire_type, to);
  to += value(field, depth);
}

void RandomWire::unknown(int depth, std::string& to) {
  constexpr std::array<std::uint32_t, 6> kNumbers{0, 17, 31, 1000, 19500, (1U << 29) - 1};
  const std::uint32_t number = one_in(4) ? static_cast<std::uint32_t>(1 + below(17))
                                         : kNumbers[one_in(30) ? 0 : 1 + below(5)];
  switch (below(6)) {
    case 0:
      tag(number, kVarint, to);
      varint(this->number(), 11, to);
      break;
    case 1:
      tag(number, kFixed64, to);
      to.append(8, '\x80');
      break;
    case 2:
      embedded(number, text(), to);
      break;
    case 3:
      tag(number, kFixed32, to);
      to.append(4, '\xff');
      break;
    case 4: {
      const std::uint64_t levels = one_in(20) ? 96 + below(8) : 1 + below(3);
      for (std::uint64_t level = 0; level < levels; ++level) tag(number, kGroup, to);
      if (depth < 3) unknown(depth + 1, to);
      for (std::uint64_t level = 0; level < levels; ++level) tag(number, kGroupEnd, to);
      break;
    }
    default:
      if (one_in(20)) {
        tag(number, one_in(2) ? kGroupEnd : 6 + below(2), to);
      }
  }
}

std::string RandomWire::value(const FieldDescriptor& field, int depth) {
  std::string value;
  switch (wire_type_of(field)) {
    case kFixed64:
      for (int left = 8; left > 0; --left) value += static_cast<char>(below(256));
      return value;
    case kFixed32:
      for (int left = 4; left > 0; --left) value += static_cast<char>(below(256));
      return value;
    case kBytes:
      if (field.type() == FieldDescriptor::TYPE_MESSAGE) {
        return message(*field.message_type(), depth + 1);
      }
      value = text();
      if (field.type() == FieldDescriptor::TYPE_BYTES) value += static_cast<char>(below(256));
      return value;
    default:
      varint(number(), one_in(200) ? 11 : 10, value);
      return value;
  }
}

std::string RandomWire::text() {
  // Names that come again, so that maps see them twice, and everything at the edges of UTF-8.
  constexpr std::array<std::string_view, 22> kParts{"",
                                                    "a",
                                                    "b",
                                                    "causal",
                                                    "query",
                                                    "\x7f",
                                                    "\xc3\xa9",
                                                    "\xc2\x80",
                                                    "\xdf\xbf",
                                                    "\xe0\xa0\x80",
                                                    "\xed\x9f\xbf",
                                                    "\xee\x80\x80",
                                                    "\xef\xbf\xbf",
                                                    "\xf0\x90\x80\x80",
                                                    "\xf4\x8f\xbf\xbf",
                                                    "12345678",
                                                    "\xe2\x82\xac uro and more",
                                                    "\xc3",
                                                    "\xed\xa0\x80",
                                                    "\xc0\x80",
                                                    "\xf4\x90\x80\x80",
                                                    "\xe0\x9f\xbf"};
  constexpr std::size_t kValid = 17;
  std::string text;
  for (std::uint64_t left = below(4); left > 0; --left) {
    text += kParts[one_in(60) ? below(kParts.size()) : below(kValid)];
  }
  return text;
}

std::uint64_t RandomWire::number() {
  constexpr std::array<std::uint64_t, 8> kNumbers{
      0, 1, 127, 128, 0x7fffffff, 0x80000000, 0xffffffff, 0xffffffffffffffff};
  return one_in(2) ? below(20) : one_in(2) ? kNumbers[below(kNumbers.size())] : random_();
}

void RandomWire::tag(std::uint32_t number, std::uint32_t wire_type, std::string& to) {
  varint(number << 3 | wire_type, one_in(100) ? 6 : 5, to);
}

void RandomWire::varint(std::uint64_t value, std::size_t most, std::string& to) {
  std::string bytes;
  append_varint(bytes, value);
  if (bytes.size() < most && one_in(25)) {
    bytes.back() |= '\x80';
    bytes.append(below(most - bytes.size()), '\x80');
    bytes += '\0';
  }
  to += bytes;
}

void RandomWire::embedded(std::uint32_t number, std::string_view body, std::string& to) {
  tag(number, kBytes, to);
  varint(body.size() + (one_in(300) ? below(3) : 0), one_in(100) ? 6 : 5, to);
  to += body;
}

}  // namespace attnserve::wire::tests
