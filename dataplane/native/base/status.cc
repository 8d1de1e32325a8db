#include "base/status.h"

#include <cxxabi.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <typeinfo>

#include "base/log.h"
#include "base/random.h"
#include "base/text.h"

namespace attnserve {

namespace {

// A status travels in a header: callers refuse headers beyond 8 KB, and all but ASCII is written as
// up to twelve bytes a character. What is wrong stands at the beginning.
constexpr std::size_t kMostCharacters = 640;

std::string shortened(const std::string& message) {
  const std::string_view kept = first_characters(message, kMostCharacters);
  return kept.size() == message.size() ? message : text(kept, " ...");
}

std::string type_name(const std::type_info& type) {
  int failed = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(
      abi::__cxa_demangle(type.name(), nullptr, nullptr, &failed), &std::free);
  return name ? name.get() : type.name();
}

Status fault(const std::string& type, std::string_view what) {
  const std::string reference = random_hex(6);
  log(Level::kError, "request failed",
      {{"reference", reference}, {"type", type}, {"exception", std::string(what)}});
  return {Code::kInternal,
          text("a fault in the server; its log has the details under ", reference),
          {}};
}

Status translated(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const RequestError& raised) {
    const Status& status = raised.status();
    return {status.code, shortened(status.message), status.retry_after};
  } catch (const std::bad_alloc&) {
    return {Code::kResourceExhausted, "memory: none is left for this request", {}};
  } catch (const std::exception& raised) {
    return fault(type_name(typeid(raised)), raised.what());
  } catch (...) {
    return fault("unknown", "not a std::exception");
  }
}

}  // namespace

std::string_view name_of(Code code) {
  static constexpr std::array<std::string_view, 17> kNames{
      "OK",
      "CANCELLED",
      "UNKNOWN",
      "INVALID_ARGUMENT",
      "DEADLINE_EXCEEDED",
      "NOT_FOUND",
      "ALREADY_EXISTS",
      "PERMISSION_DENIED",
      "RESOURCE_EXHAUSTED",
      "FAILED_PRECONDITION",
      "ABORTED",
      "OUT_OF_RANGE",
      "UNIMPLEMENTED",
      "INTERNAL",
      "UNAVAILABLE",
      "DATA_LOSS",
      "UNAUTHENTICATED",
  };
  const auto number = static_cast<std::size_t>(code);
  return number < kNames.size() ? kNames[number] : "UNKNOWN";
}

Status invalid_argument(std::string_view field, std::string_view given, std::string_view allowed) {
  return {Code::kInvalidArgument, text(field, ": given ", given, "; allowed: ", allowed), {}};
}

Status status_of(const std::exception_ptr& error) {
  if (!error) return {};
  try {
    return translated(error);
  } catch (...) {
    // Not even the message could be had; this one needs no memory.
    return {Code::kResourceExhausted, "no memory left", {}};
  }
}

}  // namespace attnserve
