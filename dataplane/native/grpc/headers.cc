#include "grpc/headers.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <utility>

#include "base/text.h"

namespace attnserve::grpc {

namespace {

constexpr std::string_view kAcceptedEncodings = "identity,deflate,gzip";
constexpr std::size_t kFieldOverhead = 32;  // RFC 9113, 6.5.2
// Fields beyond the bound are decoded on (the compression context needs it) up to so many times it.
constexpr std::size_t kHopeless = 4;
constexpr std::size_t kMostMessageCharacters = 640;

constexpr std::array<std::string_view, 17> kCodes{"0", "1",  "2",  "3",  "4",  "5",  "6",  "7", "8",
                                                  "9", "10", "11", "12", "13", "14", "15", "16"};

std::string_view code_text(Code code) {
  const auto number = static_cast<std::size_t>(code);
  return number < kCodes.size() ? kCodes[number] : kCodes[2];
}

bool is_grpc_content_type(std::string_view value) {
  constexpr std::string_view kGrpc = "application/grpc";
  if (!value.starts_with(kGrpc)) return false;
  std::string_view rest = value.substr(kGrpc.size());
  if (rest.starts_with("+proto")) rest.remove_prefix(6);
  return rest.empty() || rest.front() == ';';
}

// What the transport reads itself, or what is between it and the caller's library.
bool is_reserved(std::string_view name) {
  return name.starts_with("grpc-") || name == "te" || name == "content-type" ||
         name == "content-length" || name == "user-agent";
}

// Nanoseconds of a unit of grpc-timeout; 0: no such unit.
std::int64_t unit_nanoseconds(char unit) {
  switch (unit) {
    case 'H':
      return 3'600'000'000'000;
    case 'M':
      return 60'000'000'000;
    case 'S':
      return 1'000'000'000;
    case 'm':
      return 1'000'000;
    case 'u':
      return 1'000;
    case 'n':
      return 1;
    default:
      return 0;
  }
}

std::string seconds_text(std::chrono::microseconds duration) {
  char buffer[32];
  const int size =
      std::snprintf(buffer, sizeof buffer, "%.3f", std::chrono::duration<double>(duration).count());
  return {buffer, static_cast<std::size_t>(size)};
}

const std::uint8_t* raw(std::string_view text) {
  return reinterpret_cast<const std::uint8_t*>(text.data());
}

// nghttp2 takes pointers to what it does not change.
nghttp2_nv field(std::string_view name, std::string_view value, std::uint8_t flags) {
  return {const_cast<std::uint8_t*>(raw(name)), const_cast<std::uint8_t*>(raw(value)), name.size(),
          value.size(), flags};
}

}  // namespace

std::optional<Duration> parse_timeout(std::string_view text) {
  constexpr std::size_t kMostDigits = 8;
  if (text.size() < 2 || text.size() > kMostDigits + 1) return std::nullopt;
  const std::int64_t unit = unit_nanoseconds(text.back());
  const std::string_view digits = text.substr(0, text.size() - 1);
  if (unit == 0 || digits.find_first_not_of("0123456789") != std::string_view::npos) {
    return std::nullopt;
  }
  std::int64_t count = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), count);
  std::int64_t nanoseconds = 0;
  if (__builtin_mul_overflow(count, unit, &nanoseconds)) return Duration::max();
  return std::chrono::nanoseconds(nanoseconds);
}

void RequestHeaders::clear() {
  bytes_ = 0;
  info_ = CallInfo{};
  is_post_ = false;
  is_grpc_ = false;
  encoding_ = Encoding::kIdentity;
  unknown_encoding_.clear();
  bad_timeout_.reset();
  timeout_ = Duration::max();
  traced_ = false;
  trace_state_.clear();
}

bool RequestHeaders::add(std::string_view name, std::string_view value) {
  bytes_ += name.size() + value.size() + kFieldOverhead;
  if (bytes_ <= max_bytes_) take_field(name, value);
  return bytes_ <= kHopeless * max_bytes_;
}

void RequestHeaders::take_field(std::string_view name, std::string_view value) {
  if (name == ":path") {
    info_.path = value;
  } else if (name == ":method") {
    is_post_ = value == "POST";
  } else if (name == "content-type") {
    is_grpc_ = is_grpc_content_type(value);
  } else if (name == "grpc-timeout") {
    const auto timeout = parse_timeout(value);
    if (timeout) {
      timeout_ = *timeout;
    } else {
      bad_timeout_ = value;
    }
  } else if (name == "grpc-encoding") {
    take_encoding(value);
  } else if (name == "authorization") {
    // Several are as good as none: their sum is no token.
    if (!info_.authorization.empty()) info_.authorization += ", ";
    info_.authorization += value;
  } else if (name == "traceparent") {
    take_traceparent(value);
  } else if (name == "tracestate") {
    take_tracestate(value);
  } else if (!name.starts_with(':') && !is_reserved(name)) {
    info_.metadata.emplace_back(name, value);
  }
}

// Several are as good as none: nobody knows which one is meant.
void RequestHeaders::take_traceparent(std::string_view value) {
  const bool first = !std::exchange(traced_, true);
  info_.trace = first ? parse_traceparent(value).value_or(TraceContext{}) : TraceContext{};
}

void RequestHeaders::take_tracestate(std::string_view value) {
  if (trace_state_.size() > kMostTraceState) return;
  if (!trace_state_.empty()) trace_state_ += ',';
  trace_state_ += value.substr(0, kMostTraceState + 1);
}

void RequestHeaders::take_encoding(std::string_view value) {
  unknown_encoding_.clear();
  if (value == "gzip") {
    encoding_ = Encoding::kGzip;
  } else if (value == "deflate") {
    encoding_ = Encoding::kDeflate;
  } else if (value == "identity") {
    encoding_ = Encoding::kIdentity;
  } else {
    unknown_encoding_ = value.empty() ? std::string_view("nothing") : value;
  }
}

std::optional<Refusal> RequestHeaders::refusal() const {
  if (bytes_ > max_bytes_) {
    return Refusal{200,
                   {Code::kResourceExhausted,
                    text("metadata: given ", bytes_, " bytes; allowed: ", max_bytes_),
                    {}}};
  }
  if (!is_post_) return Refusal{405, {Code::kUnimplemented, "", {}}};
  if (!is_grpc_) return Refusal{415, {Code::kInvalidArgument, "", {}}};
  if (bad_timeout_) {
    return Refusal{200,
                   {Code::kInternal,
                    text("grpc-timeout: given ", quoted(*bad_timeout_),
                         "; allowed: at most eight digits and one of H, M, S, m, u, n"),
                    {}}};
  }
  if (!unknown_encoding_.empty()) {
    return Refusal{200,
                   {Code::kUnimplemented,
                    text("grpc-encoding: given ", quoted(unknown_encoding_),
                         "; allowed: ", kAcceptedEncodings),
                    {}}};
  }
  return std::nullopt;
}

CallInfo RequestHeaders::take_info(TimePoint arrived) {
  info_.arrived = arrived;
  if (timeout_ < kNever - arrived) info_.deadline = arrived + timeout_;
  if (info_.trace.sampled && trace_state_.size() <= kMostTraceState &&
      is_tracestate(trace_state_)) {
    info_.trace_state = trace_state_;
  }
  return std::move(info_);
}

AnswerFields::AnswerFields(Kind kind, const Status& status) {
  if (kind != Kind::kTrailers) {
    add_fixed(":status", "200");
    add_fixed("content-type", "application/grpc");
    add_fixed("grpc-accept-encoding", kAcceptedEncodings);
  }
  if (kind == Kind::kInitial) return;
  add_fixed("grpc-status", code_text(status.code));
  if (!status.message.empty()) {
    message_ = message_text(status.message);
    add_passing("grpc-message", message_);
  }
  if (status.retry_after.count() > 0) {
    retry_after_ = seconds_text(status.retry_after);
    add_passing("retry-after", retry_after_);
  }
}

AnswerFields AnswerFields::http(int status) {
  if (status == 405) return {"405", "allow", "POST"};
  return {"415", "accept", "application/grpc"};
}

AnswerFields::AnswerFields(std::string_view status, std::string_view name, std::string_view value) {
  add_fixed(":status", status);
  add_fixed(name, value);
}

void AnswerFields::add_fixed(std::string_view name, std::string_view value) {
  fields_[count_++] =
      field(name, value, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE);
}

// Not to be indexed either: values that differ each time would only drive others out of the table.
void AnswerFields::add_passing(std::string_view name, std::string_view value) {
  fields_[count_++] = field(name, value, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_INDEX);
}

std::string message_text(std::string_view message) {
  const std::string_view kept = first_characters(message, kMostMessageCharacters);
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  std::string encoded;
  encoded.reserve(kept.size() + 4);
  for (std::size_t at = 0; at < kept.size(); ++at) {
    const auto byte = static_cast<unsigned char>(kept[at]);
    // A field's value must not begin or end with white space (RFC 9113, 8.2.1).
    const bool outer_space = byte == ' ' && (at == 0 || at + 1 == kept.size());
    if (byte >= 0x20 && byte <= 0x7E && byte != '%' && !outer_space) {
      encoded += kept[at];
    } else {
      encoded += '%';
      encoded += kDigits[byte >> 4U];
      encoded += kDigits[byte & 0xFU];
    }
  }
  if (kept.size() < message.size()) encoded += " ...";
  return encoded;
}

}  // namespace attnserve::grpc
