#include <doctest/doctest.h>

#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/log.h"
#include "base/status.h"

using namespace attnserve;

namespace {

template <class Error>
Status status_when_thrown(Error error) {
  return status_of(std::make_exception_ptr(std::move(error)));
}

// Collects what is logged while it lives.
struct Collected {
  std::vector<std::string> lines;
  std::mutex mutex;  // guards lines

  Collected() {
    set_log_sink([this](const LogRecord& record) {
      const std::scoped_lock lock(mutex);
      lines.push_back(json_line(record));
    });
  }
  ~Collected() { set_log_sink({}); }
};

}  // namespace

TEST_CASE("codes have the names of gRPC") {
  CHECK(name_of(Code::kOk) == "OK");
  CHECK(name_of(Code::kInvalidArgument) == "INVALID_ARGUMENT");
  CHECK(name_of(Code::kUnauthenticated) == "UNAUTHENTICATED");
  CHECK(name_of(static_cast<Code>(200)) == "UNKNOWN");
}

TEST_CASE("the usual sentence names field, given and allowed") {
  const Status status = invalid_argument("scale", "nan", "finite and above 0");
  CHECK(status.code == Code::kInvalidArgument);
  CHECK(status.message == "scale: given nan; allowed: finite and above 0");
}

TEST_CASE("a request's error is its own status") {
  Status raised{Code::kResourceExhausted, "queue: full", std::chrono::milliseconds(5)};
  const Status status = status_when_thrown(RequestError(raised));
  CHECK(status.code == Code::kResourceExhausted);
  CHECK(status.message == "queue: full");
  CHECK(status.retry_after == std::chrono::milliseconds(5));
}

TEST_CASE("a message is cut at 640 characters, never within one") {
  const auto message = [](std::string text) {
    return status_when_thrown(RequestError(Code::kNotFound, std::move(text))).message;
  };
  CHECK(message(std::string(640, 'a')) == std::string(640, 'a'));
  CHECK(message(std::string(641, 'a')) == std::string(640, 'a') + " ...");
  std::string wide, kept;
  for (int count = 0; count < 700; ++count) wide += "語";
  for (int count = 0; count < 640; ++count) kept += "語";
  CHECK(message(wide) == kept + " ...");
}

TEST_CASE("want of memory is one request's RESOURCE_EXHAUSTED") {
  const Status status = status_when_thrown(std::bad_alloc());
  CHECK(status.code == Code::kResourceExhausted);
  CHECK(status.message == "memory: none is left for this request");
}

TEST_CASE("a fault is told to the log, and to the caller only its reference") {
  Collected collected;
  const Status status = status_when_thrown(std::runtime_error("secret \"detail\"\nline two"));
  CHECK(status.code == Code::kInternal);
  const std::string begin = "a fault in the server; its log has the details under ";
  REQUIRE(status.message.size() == begin.size() + 12);
  CHECK(status.message.starts_with(begin));
  const std::string reference = status.message.substr(begin.size());
  CHECK(reference.find_first_not_of("0123456789abcdef") == std::string::npos);
  REQUIRE(collected.lines.size() == 1);
  const std::string& line = collected.lines[0];
  CHECK(line.find("\"reference\": \"" + reference + '"') != std::string::npos);
  CHECK(line.find("secret \\\"detail\\\"\\nline two") != std::string::npos);
  CHECK(line.find("std::runtime_error") != std::string::npos);
}

TEST_CASE("what is no exception is a fault as well") {
  Collected collected;
  CHECK(status_when_thrown(42).code == Code::kInternal);
  CHECK(collected.lines.size() == 1);
}

TEST_CASE("nothing thrown is no error") { CHECK(status_of(nullptr).ok()); }
