// Callers that break the protocol, or keep to it and mean no good.
#include <doctest/doctest.h>

#include <initializer_list>

#include "grpc_harness.h"

namespace attnserve::grpc::test {

using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

std::string frame(int type, int flags, std::uint32_t stream, std::string_view payload) {
  std::string all;
  for (const int shift : {16, 8, 0}) all += static_cast<char>(payload.size() >> shift);
  all += static_cast<char>(type);
  all += static_cast<char>(flags);
  for (const int shift : {24, 16, 8, 0}) all += static_cast<char>(stream >> shift);
  return all.append(payload);
}

constexpr int kData = 0, kHeaders = 1, kPriority = 2, kSettings = 4, kPush = 5, kPing = 6,
              kWindowUpdate = 8, kContinuation = 9;

// The frames of an own caller, made by hand, to a server that has been greeted.
struct Raw : Harness {
  explicit Raw(ConnectionOptions options = {}) : Harness(options) { pump(); }

  void receive(const std::string& bytes) { connection->receive(bytes_of(bytes), now); }
};

void check_goes_away(Raw& here, std::uint32_t error, std::string_view why = {}) {
  here.pump_to_caller();
  REQUIRE(here.caller.goaways.size() == 1);
  CHECK(here.caller.goaways[0].first == error);
  if (!why.empty()) CHECK(here.caller.goaways[0].second == why);
  CHECK(here.connection->finished());
}

}  // namespace

TEST_CASE("bytes that are not HTTP/2 end the connection at once") {
  for (const std::string_view greeting : {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01",
                                          "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n garbage follows"}) {
    Harness here;
    here.connection->receive(bytes_of(greeting), here.now);
    here.pump_to_caller();
    here.at(seconds(11));
    CHECK(here.connection->finished());
  }
}

TEST_CASE("frames that break the protocol are answered by GOAWAY") {
  const std::vector<std::string> broken{
      frame(kData, 0, 0, "x"),                                // on the connection
      frame(kData, 0, 5, "x"),                                // on a stream never opened
      frame(kHeaders, 4, 2, ""),                              // an even stream
      frame(kPing, 0, 0, "short"),                            // seven bytes or less
      frame(kSettings, 0, 0, "12345"),                        // no multiple of six
      frame(kWindowUpdate, 0, 0, std::string(4, '\0')),       // by nothing
      frame(kPush, 4, 1, std::string(4, '\0')),               // callers do not push
      frame(kContinuation, 4, 1, "x"),                        // of nothing
      frame(kHeaders, 4, 1, "\xff\xff\xff\xff\xff\xff\xff"),  // no HPACK
  };
  for (const std::string& bytes : broken) {
    Raw here;
    here.receive(bytes);
    here.pump_to_caller();
    REQUIRE(here.caller.goaways.size() == 1);
    CHECK(here.caller.goaways[0].first != NGHTTP2_NO_ERROR);
    CHECK(here.connection->finished());
  }
}

TEST_CASE("a broken connection cancels its calls") {
  Raw here;
  here.caller.call("/silent");
  here.pump();
  here.receive(frame(kData, 0, 0, "x"));
  here.pump_to_caller();
  CHECK(here.service.log == Recorder::Log{"end CANCELLED", "destroyed"});
  CHECK(here.connection->finished());
}

TEST_CASE("pings every two seconds are served") {
  Raw here;
  here.caller.call("/silent");
  for (int i = 1; i <= 100; ++i) {
    here.at(seconds(2 * i));
    here.caller.ping();
    here.pump();
  }
  CHECK(here.caller.pongs == 100);
  CHECK(here.caller.goaways.empty());
}

TEST_CASE("a ping per answer is served, however fast") {
  Raw here;
  const auto id = here.caller.call("/echo");
  for (int i = 0; i < 1000; ++i) {
    here.caller.write(id, framed("x"));
    here.pump();
    here.caller.ping();
    here.pump();
  }
  CHECK(here.caller.pongs == 1000);
  CHECK(here.caller.goaways.empty());
}

TEST_CASE("a flood of pings ends the connection") {
  Raw here;
  here.caller.call("/silent");
  here.pump();
  here.at(seconds(5));
  for (int i = 0; i < 50; ++i) here.receive(frame(kPing, 0, 0, "12345678"));
  check_goes_away(here, NGHTTP2_ENHANCE_YOUR_CALM, "too_many_pings");
  CHECK(here.service.log == Recorder::Log{"end CANCELLED", "destroyed"});
}

TEST_CASE("a flood of settings ends the connection") {
  Raw here;
  for (int i = 0; i < 900; ++i) {
    here.caller.settings();
    here.pump();
  }
  CHECK(here.caller.goaways.empty());
  for (int i = 0; i < 200; ++i) {
    here.caller.settings();
    here.pump();
  }
  check_goes_away(here, NGHTTP2_ENHANCE_YOUR_CALM);
}

TEST_CASE("settings whose acknowledgement nobody reads end the connection") {
  ConnectionOptions options;
  options.max_resets = 1'000'000;
  Raw here(options);
  for (int i = 0; i < 3000; ++i) here.receive(frame(kSettings, 0, 0, ""));
  CHECK(here.connection->finished());
}

TEST_CASE("rapid resets end the connection of the caller alone") {
  ConnectionOptions options;
  options.max_resets = 100;
  options.resets_per_second = 10;
  Raw here(options);
  Raw other(options);
  other.caller.call("/silent");
  other.pump();
  for (int i = 0; i < 100; ++i) {
    const auto id = here.caller.call("/silent");
    here.pump();
    here.caller.reset(id);
    here.pump();
  }
  CHECK(here.caller.goaways.empty());
  here.at(seconds(1));
  for (int i = 0; i < 20; ++i) {
    const auto id = here.caller.call("/silent");
    here.pump_to_server();
    here.caller.reset(id);
    here.pump_to_server();
  }
  check_goes_away(here, NGHTTP2_ENHANCE_YOUR_CALM, "too_many_resets");
  CHECK(other.connection->open_calls() == 1);
  CHECK_FALSE(other.connection->finished());
}

TEST_CASE("calls given up after a while are not rapid resets") {
  ConnectionOptions options;
  options.max_resets = 10;
  options.resets_per_second = 1;
  Raw here(options);
  for (int i = 1; i <= 100; ++i) {
    const auto id = here.caller.call("/silent");
    here.pump();
    here.at(milliseconds(150 * i));
    here.caller.reset(id);
    here.pump();
  }
  CHECK(here.caller.goaways.empty());
  CHECK(here.connection->open_calls() == 0);
}

TEST_CASE("resets that the caller makes the server send count as its own") {
  ConnectionOptions options;
  options.max_resets = 50;
  options.resets_per_second = 1;
  Raw here(options);
  for (int i = 0; i < 100; ++i) {
    const auto id = here.caller.call("/silent");
    here.pump();
    here.receive(frame(kWindowUpdate, 0, static_cast<std::uint32_t>(id), "\x7f\xff\xff\xff"));
    here.pump();
  }
  REQUIRE_FALSE(here.caller.goaways.empty());
  CHECK(here.caller.goaways[0].first == NGHTTP2_ENHANCE_YOUR_CALM);
  CHECK(here.connection->finished());
}

TEST_CASE("endless CONTINUATION ends the connection") {
  Raw here;
  here.receive(frame(kHeaders, 0, 1, ""));
  for (int i = 0; i < 100; ++i) here.receive(frame(kContinuation, 0, 1, ""));
  here.pump_to_caller();
  CHECK(here.connection->finished());
}

TEST_CASE("more streams at once than allowed are refused") {
  ConnectionOptions options;
  options.max_concurrent_streams = 10;
  Raw here(options);
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 20; ++i) ids.push_back(here.caller.call("/silent"));
  here.pump();
  CHECK(here.connection->open_calls() == 10);  // the rest waits in the caller
  CHECK(here.caller.goaways.empty());
}

TEST_CASE("padding and priorities change nothing") {
  Raw here;
  const auto id = here.caller.call("/echo");
  here.pump();
  std::string padded(1, '\x04');
  padded += framed("x") + std::string(4, '\0');
  here.receive(frame(kPriority, 0, 1, std::string("\0\0\0\0\x10", 5)));
  here.receive(frame(kData, 8 | 1, static_cast<std::uint32_t>(id), padded));
  here.pump_to_caller();
  CHECK(here.caller.exchange(id).messages() == std::vector<std::string>{"x"});
  CHECK(here.caller.exchange(id).status() == "0");
}

TEST_CASE("frames that nobody knows are ignored") {
  Raw here;
  here.receive(frame(0x42, 0xff, 0, "something"));
  here.receive(frame(0x10, 0, 0, std::string("\0\0\0\1u=1", 7)));  // PRIORITY_UPDATE
  const std::string body = framed("x");
  const auto id = here.caller.call("/echo", &body);
  here.pump();
  CHECK(here.caller.exchange(id).status() == "0");
}

TEST_CASE("a window that would be negative or too large is the peer's error, not a crash") {
  Raw here;
  const std::string body = framed(std::string(100'000, 'x'));
  const auto id = here.caller.call("/echo", &body);
  here.pump_to_server();
  std::string shrink("\0\4\0\0\0\0", 6);
  here.receive(frame(kSettings, 0, 0, shrink));
  here.pump_to_caller();
  CHECK_FALSE(here.caller.exchange(id).ended);
  here.receive(frame(kWindowUpdate, 0, 0, "\x7f\xff\xff\xff"));
  here.receive(frame(kWindowUpdate, 0, 0, "\x7f\xff\xff\xff"));
  here.pump_to_caller();
  CHECK(here.connection->finished());
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("frames longer than allowed are refused") {
  ConnectionOptions options;
  options.max_frame_size = 1U << 14;
  Raw here(options);
  here.receive(frame(kData, 0, 1, std::string(20'000, 'x')));
  check_goes_away(here, NGHTTP2_FRAME_SIZE_ERROR);
}

TEST_CASE("resets that cross refusals are no nuisance") {
  Harness here;
  for (int i = 0; i < 3000; ++i) {
    const auto id = here.caller.call("/refused");
    here.pump_to_server();
    here.caller.reset(id);
    const std::string crossing = here.caller.outgoing();
    here.pump_to_caller();
    here.connection->receive(bytes_of(crossing), here.now);
  }
  here.pump();
  CHECK(here.service.counted.size() == 3000);
  CHECK(here.caller.goaways.empty());
}

}  // namespace attnserve::grpc::test
