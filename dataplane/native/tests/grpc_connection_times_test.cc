// What time does to a connection and its calls.
#include <doctest/doctest.h>

#include "grpc_harness.h"

namespace attnserve::grpc::test {

using Log = Recorder::Log;
using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

namespace {

ConnectionOptions quiet() {  // nothing happens by itself but what a test asks for
  ConnectionOptions options;
  options.idle_timeout = Duration::zero();
  options.keepalive_interval = Duration::zero();
  return options;
}

}  // namespace

TEST_CASE("whoever says nothing at first is cut off") {
  Harness here(quiet());
  CHECK(here.connection->next_timer() == here.start + seconds(10));
  here.connection->receive(bytes_of("PRI * HTTP/2.0\r\n"), here.now);
  here.at(milliseconds(9'999));
  CHECK_FALSE(here.connection->finished());
  here.at(seconds(10));
  CHECK(here.connection->finished());
}

TEST_CASE("whoever says hello and waits is not") {
  Harness here(quiet());
  here.pump();
  here.at(minutes(60));
  CHECK_FALSE(here.connection->finished());
  CHECK(here.connection->next_timer() == kNever);
}

TEST_CASE("headers that do not come to their end cut the connection off") {
  Harness here(quiet());
  here.pump();
  here.at(seconds(100));
  // HEADERS without END_HEADERS, of no bytes yet.
  here.connection->receive(bytes_of(std::string("\0\0\0\1\0\0\0\0\1", 9)), here.now);
  here.at(seconds(111));
  CHECK(here.connection->finished());
}

TEST_CASE("a deadline ends the call, and its handler hears so") {
  Harness here(quiet());
  const auto id = here.caller.call("/silent", nullptr, {{"grpc-timeout", "2S"}});
  const auto other = here.caller.call("/silent", nullptr, {{"grpc-timeout", "3S"}});
  here.pump();
  here.at(milliseconds(1999));
  CHECK(here.service.log.empty());
  here.at(milliseconds(2000));
  here.pump();
  CHECK(here.caller.exchange(id).status() == "4");
  CHECK(here.caller.exchange(id).field("grpc-message").find("deadline") != std::string::npos);
  CHECK(here.service.log == Log{"end DEADLINE_EXCEEDED", "destroyed"});
  CHECK_FALSE(here.caller.exchange(other).ended);
  here.at(seconds(3));
  here.pump();
  CHECK(here.caller.exchange(other).status() == "4");
  CHECK(here.connection->open_calls() == 0);
}

TEST_CASE("a slow body ends its call after the grace") {
  ConnectionOptions options = quiet();
  options.body_pace.bytes_per_second = 1000;
  Harness here(options);
  const auto slow = here.caller.call("/silent");
  const auto fast = here.caller.call("/silent");
  const auto idle = here.caller.call("/silent");
  here.caller.write(slow, framed(std::string(1U << 20, 'x')).substr(0, 2000));
  here.caller.write(fast, framed(std::string(1U << 20, 'x')).substr(0, 2000));
  here.caller.write(idle, framed("whole"));
  here.pump();
  for (int second = 1; second < 12; ++second) {
    here.at(seconds(second));
    here.caller.write(fast, std::string(1000, 'x'));
    here.pump();
  }
  CHECK(here.caller.exchange(slow).status().empty());
  here.at(seconds(12));
  here.pump();
  CHECK(here.caller.exchange(slow).status() == "4");
  CHECK(here.caller.exchange(slow).field("grpc-message").starts_with("body: "));
  here.at(seconds(20));
  here.pump();
  CHECK_FALSE(here.caller.exchange(fast).ended);
  here.at(minutes(60));
  CHECK_FALSE(here.caller.exchange(idle).ended);
}

TEST_CASE("a body that stops is given up, however much of it had come fast") {
  Harness here(quiet());
  const auto id = here.caller.call("/silent");
  here.caller.write(id, framed(std::string(3U << 20, 'x')).substr(0, 2U << 20));
  here.pump();
  here.at(seconds(19));
  CHECK_FALSE(here.caller.exchange(id).ended);
  CHECK(here.budget.lent() > 0);
  here.at(seconds(20));
  here.pump();
  CHECK(here.caller.exchange(id).status() == "4");
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("a handler hears when its time has come, between messages too") {
  Harness here(quiet());
  here.service.prepare = [&](Recorder& handler) {
    handler.message_hook = [&](Call&, Bytes) { handler.next = here.now + seconds(5); };
    handler.due_hook = [](Call& call, TimePoint) { call.finish({Code::kAborted, "late", {}}); };
  };
  const auto id = here.caller.call("/silent");
  here.pump();
  here.at(seconds(100));
  here.caller.write(id, framed("one"));
  here.pump();
  here.at(seconds(103));
  here.caller.write(id, framed("two"));
  here.pump();
  here.at(seconds(107));
  CHECK(here.service.log == Log{"message one", "message two"});
  here.at(seconds(108));
  here.pump();
  CHECK(here.service.log.at(2) == "due");
  CHECK(here.caller.exchange(id).status() == "10");
  here.at(minutes(60));
  CHECK(std::ranges::count(here.service.log, "due") == 1);
}

TEST_CASE("nothing is due while the caller may not send") {
  Harness here(quiet());
  here.service.prepare = [&](Recorder& handler) {
    handler.message_hook = [&](Call& call, Bytes) {
      handler.next = here.now + seconds(5);
      call.pause();
    };
  };
  const auto id = here.caller.call("/silent");
  here.caller.write(id, framed("one"));
  here.pump();
  here.at(minutes(10));
  CHECK(here.service.log == Log{"message one"});
  here.service.calls[0]->resume();
  here.connection->take_mail(here.now);
  here.at(minutes(10) + seconds(4));
  CHECK(here.service.log == Log{"message one"});
  here.at(minutes(10) + seconds(5));
  CHECK(here.service.log == Log{"message one", "due"});
}

TEST_CASE("a pause is not held against the caller") {
  Harness here(quiet());
  const auto id = here.caller.call("/silent");
  here.caller.write(id, framed(std::string(1U << 20, 'x')).substr(0, 1000));
  here.pump();
  here.service.calls[0]->pause();
  here.connection->take_mail(here.now);
  here.at(minutes(10));
  CHECK_FALSE(here.service.calls[0]->ended());
  here.service.calls[0]->resume();
  here.connection->take_mail(here.now);
  here.at(minutes(10) + seconds(9));
  CHECK_FALSE(here.service.calls[0]->ended());
  here.at(minutes(10) + seconds(11));
  CHECK(here.service.calls[0]->ended());
}

TEST_CASE("a caller that does not read its answer is reset, others are not") {
  Harness here(quiet(), {.reads = false, .window = 1000});
  const std::string large = framed(std::string(5000, 'x'));
  const auto stuck = here.caller.call("/echo", &large);
  const auto open = here.caller.call("/silent");
  here.pump();
  here.at(seconds(29));
  CHECK_FALSE(here.caller.exchange(stuck).closed);
  here.caller.read_all(stuck);  // progress
  here.pump();
  here.at(seconds(58));
  CHECK_FALSE(here.caller.exchange(stuck).closed);
  here.at(seconds(60));
  CHECK(here.caller.exchange(stuck).closed);
  CHECK(here.caller.exchange(stuck).error == NGHTTP2_CANCEL);
  CHECK(here.service.log.at(2) == "end CANCELLED");
  CHECK(here.budget.lent() == 0);
  CHECK_FALSE(here.caller.exchange(open).closed);
  CHECK(here.connection->open_calls() == 1);
}

TEST_CASE("a socket that takes nothing is given up") {
  Harness here(quiet());
  const std::string body = framed("x");
  here.caller.call("/echo", &body);
  here.pump_to_server();
  std::array<iovec, 4> parts;
  CHECK(here.connection->output(parts) > 0);
  here.now += seconds(29);
  here.connection->on_timer(here.now);
  here.connection->written(1, here.now);
  here.now += seconds(29);
  here.connection->on_timer(here.now);
  CHECK_FALSE(here.connection->finished());
  CHECK(here.connection->next_timer() == here.now + seconds(1));
  here.now += seconds(1);
  here.connection->on_timer(here.now);
  CHECK(here.connection->finished());
  CHECK(here.connection->output(parts) == 0);
  CHECK(here.service.log.at(2) == "end CANCELLED");
}

TEST_CASE("an idle connection is told to go") {
  ConnectionOptions options = quiet();
  options.idle_timeout = minutes(5);
  Harness here(options);
  const std::string body = framed("x");
  here.pump();
  here.at(minutes(4));
  here.caller.call("/echo", &body);
  here.pump();
  here.at(minutes(8));
  CHECK(here.caller.goaways.empty());
  here.at(minutes(9));
  CHECK(here.caller.goaways.size() == 1);
  CHECK(here.caller.goaways[0].first == NGHTTP2_NO_ERROR);
  CHECK_FALSE(here.connection->finished());  // a call may be on its way
  here.at(minutes(9) + seconds(1));
  CHECK(here.connection->finished());
}

TEST_CASE("a connection with a call open is not idle") {
  ConnectionOptions options = quiet();
  options.idle_timeout = minutes(5);
  Harness here(options);
  here.caller.call("/silent");
  here.pump();
  here.at(minutes(50));
  CHECK(here.caller.goaways.empty());
}

TEST_CASE("an old connection goes once its calls have ended, or after the grace") {
  ConnectionOptions options = quiet();
  options.max_age = minutes(10);
  Harness here(options);
  const auto id = here.caller.call("/silent");
  here.pump();
  here.at(minutes(9) - seconds(1));
  CHECK(here.caller.goaways.empty());
  here.at(minutes(10));
  here.pump();
  CHECK(here.caller.goaways.size() == 2);
  CHECK_FALSE(here.connection->finished());
  CHECK_FALSE(here.caller.exchange(id).closed);
  here.at(minutes(10) + seconds(31));
  here.pump();
  CHECK(here.connection->finished());
  CHECK(here.service.log == Log{"end CANCELLED", "destroyed"});
}

TEST_CASE("draining serves what was on its way and ends with the last call") {
  Harness here(quiet());
  const std::string body = framed("x");
  const auto open = here.caller.call("/silent");
  here.pump();
  here.connection->drain(here.now);
  const auto on_its_way = here.caller.call("/echo", &body);  // the GOAWAY has not arrived
  here.pump();
  CHECK(here.caller.exchange(on_its_way).status() == "0");
  CHECK(here.caller.last_stream_ids == std::vector<std::int32_t>{2147483647, 3});
  CHECK_FALSE(here.connection->finished());
  here.service.calls[0]->finish({});
  here.connection->take_mail(here.now);
  here.pump();
  CHECK(here.caller.exchange(open).status() == "0");
  CHECK(here.connection->finished());
}

TEST_CASE("draining does not wait for a caller that answers no pings") {
  Harness here(quiet());
  here.pump();
  here.connection->drain(here.now);
  here.pump_to_caller();
  CHECK_FALSE(here.connection->finished());
  here.at(seconds(1));
  CHECK(here.connection->finished());
}

TEST_CASE("pings of ours tell a living caller from a dead one") {
  ConnectionOptions options = quiet();
  options.keepalive_interval = minutes(1);
  Harness here(options);
  here.caller.call("/silent");
  here.pump();
  here.at(minutes(1));
  here.pump();
  CHECK(here.caller.pings == 1);
  here.at(minutes(2) - seconds(1));
  CHECK(here.caller.pings == 1);
  here.at(minutes(2));
  CHECK(here.caller.pings == 2);
  here.at(minutes(2) + seconds(19));
  CHECK_FALSE(here.connection->finished());
  here.at(minutes(2) + seconds(20));
  CHECK(here.connection->finished());
  CHECK(here.service.log == Log{"end CANCELLED", "destroyed"});
}

TEST_CASE("too many unsent bytes stop deliveries until they are written") {
  ConnectionOptions options = quiet();
  options.max_unsent_bytes = 100'000;
  Harness here(options, {.reads = false, .window = 1000});
  const std::string large = framed(std::string(150'000, 'x'));
  const std::string small = framed("y");
  const auto first = here.caller.call("/echo", &large);
  here.pump();
  CHECK(here.connection->wants_read());  // what waits does not wait for the socket
  const auto second = here.caller.call("/echo", &small);
  here.pump();
  CHECK_FALSE(here.caller.exchange(second).ended);
  CHECK(here.connection->wants_read());
  while (!here.caller.exchange(first).ended) {
    here.caller.read_all(first);
    here.pump();
  }
  CHECK(here.caller.exchange(second).status() == "0");
  CHECK(here.budget.lent() == 0);

  const auto third = here.caller.call("/echo", &large);
  here.pump_to_server();
  std::array<iovec, 4> parts;
  CHECK(here.connection->output(parts) > 0);
  CHECK_FALSE(here.connection->wants_read());  // the socket is what it waits for
  here.pump_to_caller();
  CHECK(here.connection->wants_read());
  here.caller.reset(third);
  here.pump();
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("open calls are looked at again each second, and end if their callers may not go on") {
  Harness here;
  std::vector<std::string> asked;
  std::optional<Status> verdict;
  here.service.again = [&](const CallInfo& info, bool trusted) {
    asked.push_back(info.path + (trusted ? "" : " untrusted"));
    return info.path == "/silent" ? verdict : std::nullopt;
  };
  here.pump();
  here.at(seconds(5));
  CHECK(asked.empty());  // there is no call
  const auto silent = here.caller.call("/silent"), echo = here.caller.call("/echo");
  here.pump();
  here.at(milliseconds(6'001));
  CHECK(asked.size() >= 2);
  asked.clear();
  here.at(milliseconds(6'900));
  CHECK(asked.empty());
  here.at(milliseconds(7'002));
  CHECK(asked == std::vector<std::string>{"/silent", "/echo"});
  verdict = Status{Code::kUnauthenticated, "withdrawn", {}};
  here.at(milliseconds(8'003));
  here.pump();
  CHECK(here.caller.exchange(silent).status() == "16");
  CHECK(here.caller.exchange(silent).field("grpc-message") == "withdrawn");
  CHECK_FALSE(here.caller.exchange(echo).ended);
  here.caller.write(echo, framed("x"), true);
  here.pump();
  CHECK(here.caller.exchange(echo).messages() == std::vector<std::string>{"x"});
  CHECK(here.connection->open_calls() == 0);
}

TEST_CASE("a certificate that is trusted no more is forgotten, and its connection is to end") {
  Harness here;
  bool trusted = true;
  std::vector<bool> seen;
  here.service.again = [&](const CallInfo&, bool good) -> std::optional<Status> {
    seen.push_back(good);
    if (good) return std::nullopt;
    return Status{Code::kUnauthenticated, "untrusted", {}};
  };
  here.connection->set_certificate({"name"}, [&] { return trusted; });
  const auto before = here.caller.call("/silent");
  here.pump();
  CHECK(here.service.calls.back()->info().certificate->front() == "name");
  trusted = false;
  here.at(milliseconds(500));
  CHECK(seen.empty());
  // A call looks as well, before it is accepted.
  here.now = here.start + milliseconds(1'500);
  const auto late = here.caller.call("/silent");
  here.pump();
  CHECK(seen == std::vector<bool>{false});
  CHECK(here.caller.exchange(before).status() == "16");
  CHECK(here.service.calls.back()->info().certificate == nullptr);
  CHECK_FALSE(here.caller.exchange(late).ended);  // whoever it is, it is nobody by a certificate
  CHECK_FALSE(here.caller.goaways.empty());
}

}  // namespace attnserve::grpc::test
