#include <doctest/doctest.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/log.h"

using namespace attnserve;

namespace {

std::string line_of(Level level, std::string_view event, std::vector<LogField> fields) {
  using std::chrono::milliseconds;
  const std::chrono::system_clock::time_point time{milliseconds(1'700'000'000'007)};
  return json_line({time, level, event, fields});
}

}  // namespace

TEST_CASE("an event is one JSON object") {
  CHECK(line_of(Level::kInfo, "serving", {{"address", "127.0.0.1:1"}, {"pid", "7"}}) ==
        R"({"time": "2023-11-14T22:13:20.007Z", "level": "info", "logger": "attnserve_dataplane", )"
        R"("message": "serving", "address": "127.0.0.1:1", "pid": "7"})");
}

TEST_CASE("what a caller sent can neither end a line nor leave its string") {
  const std::string line =
      line_of(Level::kError, "x\r\ny", {{"a\"b", "\", \"level\": \"info\\"}, {"c", "ä😀\xff\x1b"}});
  CHECK(line.find('\n') == std::string::npos);
  CHECK(
      line.ends_with("\"message\": \"x\\u000d\\ny\", \"a\\\"b\": "
                     "\"\\\", \\\"level\\\": \\\"info\\\\\", "
                     "\"c\": \"\\u00e4\\ud83d\\ude00\\ufffd\\u001b\"}"));
}

TEST_CASE("a value fills no disk") {
  CHECK(line_of(Level::kInfo, "x", {{"a", std::string(1 << 20, 'a')}}).size() < 5000);
}

TEST_CASE("a sink that throws loses the event and nothing else") {
  set_log_sink([](const LogRecord&) { throw std::runtime_error("broken"); });
  log(Level::kError, "lost");
  set_log_sink({});
}

TEST_CASE("events come from many threads while the sink is changed") {
  std::atomic<int> seen{0};
  const auto sink = [&](const LogRecord& record) {
    if (record.fields.size() == 1) ++seen;
  };
  set_log_sink(sink);
  std::vector<std::thread> threads;
  for (int number = 0; number < 4; ++number) {
    threads.emplace_back([] {
      for (int count = 0; count < 500; ++count) log(Level::kInfo, "x", {{"count", "1"}});
    });
  }
  for (int count = 0; count < 100; ++count) set_log_sink(sink);
  for (std::thread& thread : threads) thread.join();
  set_log_sink({});
  CHECK(seen == 2000);
}
