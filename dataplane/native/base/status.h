// What can go wrong with a request: a gRPC status, raised where the fact is known and turned into
// trailers once, in grpc/. Messages name the field, what was given and what is allowed.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <utility>

namespace attnserve {

// The numbers of google.rpc.Code.
enum class Code : std::uint8_t {
  kOk = 0,
  kCancelled = 1,
  kUnknown = 2,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kAlreadyExists = 6,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kAborted = 10,
  kOutOfRange = 11,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kDataLoss = 15,
  kUnauthenticated = 16,
};

// "INVALID_ARGUMENT" and so on.
std::string_view name_of(Code code);

struct Status {
  Code code = Code::kOk;
  std::string message;
  // RESOURCE_EXHAUSTED: after which the same request may be taken; 0: not known, or never.
  std::chrono::microseconds retry_after{0};

  bool ok() const { return code == Code::kOk; }
};

// "FIELD: given GIVEN; allowed: ALLOWED", INVALID_ARGUMENT.
Status invalid_argument(std::string_view field, std::string_view given, std::string_view allowed);

// A request that cannot be answered. Thrown by checks; refusals before a body is read, which must
// cost nothing, return a Status instead.
class RequestError : public std::exception {
 public:
  explicit RequestError(Status status) : status_(std::move(status)) {}
  RequestError(Code code, std::string message) : status_{code, std::move(message), {}} {}

  const Status& status() const { return status_; }
  const char* what() const noexcept override { return status_.message.c_str(); }

 private:
  Status status_;
};

// The status of whatever was thrown: a RequestError's own; RESOURCE_EXHAUSTED for std::bad_alloc;
// INTERNAL for the rest, which is logged under a reference that the message names.
Status status_of(const std::exception_ptr& error);

}  // namespace attnserve
