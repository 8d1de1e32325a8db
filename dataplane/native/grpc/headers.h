// The header fields of gRPC over HTTP/2: what a request's say, and what an answer's are.
#pragma once

#include <nghttp2/nghttp2.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/status.h"
#include "grpc/call.h"

namespace attnserve::grpc {

enum class Encoding : std::uint8_t { kIdentity, kGzip, kDeflate };

// grpc-timeout: one to eight digits and a unit out of "HMSmun"; nothing if it is not that. Times
// too long for the clock are Duration::max().
std::optional<Duration> parse_timeout(std::string_view text);

// Why a request is no call: an HTTP status for what is not gRPC at all, else a gRPC status.
struct Refusal {
  int http_status = 200;
  Status status;
};

// Collects the fields of one request as they are decoded.
class RequestHeaders {
 public:
  explicit RequestHeaders(std::size_t max_bytes) : max_bytes_(max_bytes) {}

  void clear();
  // False once the fields are so far beyond the bound that decoding more of them serves nobody.
  bool add(std::string_view name, std::string_view value);

  // To be called once all have come; nothing: it is a call.
  std::optional<Refusal> refusal() const;
  // Takes path and metadata out; `arrived` and what follows from it are filled in.
  CallInfo take_info(TimePoint arrived);
  Encoding encoding() const { return encoding_; }

 private:
  void take_field(std::string_view name, std::string_view value);
  void take_encoding(std::string_view value);
  void take_traceparent(std::string_view value);
  void take_tracestate(std::string_view value);

  std::size_t max_bytes_;
  std::size_t bytes_ = 0;  // as SETTINGS_MAX_HEADER_LIST_SIZE counts: names, values, 32 each
  CallInfo info_;
  bool is_post_ = false;
  bool is_grpc_ = false;
  Encoding encoding_ = Encoding::kIdentity;
  std::string unknown_encoding_;
  std::optional<std::string> bad_timeout_;
  Duration timeout_ = Duration::max();
  bool traced_ = false;  // a traceparent has come
  std::string
      trace_state_;  // too long: not to be used; its memory serves one request after another
};

// The header fields of an answer. What `fields` gives is valid as long as the object.
class AnswerFields {
 public:
  static AnswerFields initial() { return {Kind::kInitial, {}}; }
  static AnswerFields trailers(const Status& status) { return {Kind::kTrailers, status}; }
  static AnswerFields trailers_only(const Status& status) { return {Kind::kTrailersOnly, status}; }
  static AnswerFields http(int status);  // 405 or 415

  AnswerFields(const AnswerFields&) = delete;
  AnswerFields& operator=(const AnswerFields&) = delete;

  std::span<const nghttp2_nv> fields() const { return {fields_.data(), count_}; }

 private:
  enum class Kind : std::uint8_t { kInitial, kTrailers, kTrailersOnly };

  AnswerFields(Kind kind, const Status& status);
  AnswerFields(std::string_view status, std::string_view name, std::string_view value);
  void add_fixed(std::string_view name, std::string_view value);    // both live for ever
  void add_passing(std::string_view name, std::string_view value);  // the value does not; name does

  std::array<nghttp2_nv, 6> fields_;
  std::size_t count_ = 0;
  std::string message_;
  std::string retry_after_;
};

// grpc-message: shortened to 640 characters and " ...", all but printable ASCII percent-encoded.
std::string message_text(std::string_view message);

}  // namespace attnserve::grpc
