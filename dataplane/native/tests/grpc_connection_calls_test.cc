// Calls over one connection: headers, bodies, answers, ends.
#include <doctest/doctest.h>

#include "base/text.h"
#include "grpc_harness.h"

namespace attnserve::grpc::test {

using Log = Recorder::Log;

TEST_CASE("a unary call is answered with headers, message and trailers") {
  Harness here;
  const std::string body = framed("hello");
  const auto id = here.caller.call("/echo", &body);
  here.pump();
  Exchange& exchange = here.caller.exchange(id);
  CHECK(exchange.headers == Fields{{":status", "200"},
                                   {"content-type", "application/grpc"},
                                   {"grpc-accept-encoding", "identity,deflate,gzip"}});
  CHECK(exchange.messages() == std::vector<std::string>{"hello"});
  CHECK(exchange.trailers == Fields{{"grpc-status", "0"}});
  CHECK(exchange.closed);
  CHECK(exchange.error == 0);
  CHECK(here.service.log == Log{"message hello", "half close", "all sent", "end OK", "destroyed"});
  CHECK(here.connection->open_calls() == 0);
  CHECK(here.service.calls[0]->ended());
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("bytes may come one by one") {
  Harness here;
  const std::string body = framed("hello") + framed("") + framed("world");
  const auto id = here.caller.call("/echo", &body);
  here.pump(1);
  CHECK(here.caller.exchange(id).messages() == std::vector<std::string>{"hello", "", "world"});
  CHECK(here.caller.exchange(id).status() == "0");
}

TEST_CASE("large messages cross windows both ways and are charged until they are written") {
  ConnectionOptions options;
  options.stream_window = 1U << 16;
  Harness here(options, {.window = 100'000});
  std::string message(3'000'000, '\0');
  for (std::size_t i = 0; i < message.size(); ++i) message[i] = static_cast<char>(i * 7 / 3);
  const std::string body = framed(message);
  const auto id = here.caller.call("/echo", &body);
  here.pump(50'000);
  const auto messages = here.caller.exchange(id).messages();
  REQUIRE(messages.size() == 1);
  CHECK((messages[0] == message));
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("a socket that takes a few bytes at a time changes nothing") {
  Harness here;
  std::string message;
  for (int i = 0; i < 40'000; ++i) message += std::to_string(i);
  const std::string body = framed(message) + framed("x") + framed(message);
  const auto id = here.caller.call("/echo", &body);
  bool moved = true;
  while (moved) {
    moved = here.pump_to_server();
    for (const std::size_t most : {1, 8, 10, 4096, 17, 70'000}) {
      moved = here.pump_to_caller(most) || moved;
    }
  }
  CHECK((here.caller.exchange(id).messages() == std::vector<std::string>{message, "x", message}));
}

TEST_CASE("what is known of a call is known from its headers") {
  Harness here;
  here.caller.call("/silent", nullptr,
                   {{"grpc-timeout", "1500m"},
                    {"x-user", "one"},
                    {"x-user", "two"},
                    {"x-raw-bin", "AAEC"},
                    {"user-agent", "test"},
                    {"grpc-accept-encoding", "gzip"}});
  here.pump();
  const CallInfo& info = here.service.calls.at(0)->info();
  CHECK(info.path == "/silent");
  CHECK(info.peer == "ipv4:127.0.0.1:4242");
  CHECK(info.connection == 7);
  CHECK(info.arrived == here.now);
  CHECK(info.deadline == here.now + std::chrono::milliseconds(1500));
  CHECK(info.metadata == Fields{{"x-user", "one"}, {"x-user", "two"}, {"x-raw-bin", "AAEC"}});
}

TEST_CASE("the trace of a call is known from its headers, or there is none") {
  const std::string good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
  const std::string quiet = good.substr(0, 54) + "0";
  const auto told = [](const Fields& fields) {
    Harness here;
    here.caller.call("/silent", nullptr, fields);
    here.pump();
    return here.service.calls.at(0)->info();
  };
  const CallInfo info = told({{"tracestate", "a=1"}, {"traceparent", good}, {"tracestate", "b=2"}});
  CHECK(hex_of(info.trace.trace_id) == good.substr(3, 32));
  CHECK(hex_of(info.trace.span_id) == good.substr(36, 16));
  CHECK(info.trace.sampled);
  CHECK(info.trace_state == "a=1,b=2");
  CHECK(info.metadata.empty());
  CHECK_FALSE(told({}).trace.present());
  CHECK_FALSE(told({{"traceparent", good}, {"traceparent", good}}).trace.present());
  CHECK_FALSE(told({{"traceparent", "00-1-2-3"}}).trace.present());
  CHECK(told({{"traceparent", quiet}, {"tracestate", "a=1"}}).trace_state.empty());
  CHECK(told({{"traceparent", good}, {"tracestate", "no list"}}).trace_state.empty());
  CHECK(told({{"traceparent", good}, {"tracestate", "no list"}}).trace.present());
  const std::string longest = text("a=", std::string(250, 'x'), ",b=", std::string(250, 'y'));
  CHECK(told({{"traceparent", good}, {"tracestate", longest}}).trace_state == longest);
  CHECK(told({{"traceparent", good}, {"tracestate", longest}, {"tracestate", text("c=", longest)}})
            .trace_state.empty());
}

TEST_CASE("a refusal needs no body: trailers alone, then the stream is reset without an error") {
  ConnectionOptions options;
  options.stream_window = 1U << 16;
  Harness here(options);
  const std::string body(10U << 20, 'x');
  const auto id = here.caller.call("/refused", &body);
  here.pump();
  Exchange& exchange = here.caller.exchange(id);
  CHECK(exchange.status() == "8");
  CHECK(exchange.field("grpc-message") == "full");
  CHECK(exchange.field("retry-after") == "1.500");
  CHECK(exchange.trailers.empty());
  CHECK(exchange.closed);
  CHECK(exchange.error == NGHTTP2_NO_ERROR);
  CHECK(here.service.counted ==
        std::vector<std::pair<std::string, Code>>{{"/refused", Code::kResourceExhausted}});
  CHECK(here.connection->open_calls() == 0);
}

TEST_CASE("bodies that are not read give the connection's window back") {
  ConnectionOptions options;
  options.stream_window = 1U << 16;
  options.connection_window = 1U << 17;
  Harness here(options);
  const std::string body(1U << 20, 'x');
  for (int i = 0; i < 50; ++i) here.caller.call("/refused", &body);
  here.pump();
  const std::string last = framed(std::string(500'000, 'y'));
  const auto id = here.caller.call("/echo", &last);
  here.pump();
  CHECK(here.caller.exchange(id).status() == "0");
}

TEST_CASE("while calls are refused, bodies come once their calls are admitted") {
  ConnectionOptions options;
  options.stream_window = 1U << 17;
  Harness here(options);
  const auto ahead = [&] {
    return nghttp2_session_get_remote_settings(here.caller.session(),
                                               NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE);
  };
  const std::string large = framed(std::string(1U << 20, 'y'));
  const auto begun = here.caller.call("/echo");
  here.caller.write(begun, large.substr(0, 100'000));
  here.pump();
  CHECK(ahead() == options.stream_window);

  here.caller.call("/refused", &large);
  here.pump();
  CHECK(ahead() == 1U << 10);
  const auto refused = here.caller.call("/refused", &large);
  const std::string sent = here.caller.outgoing();
  CHECK(sent.size() < 2000);
  here.connection->receive(bytes_of(sent), here.now);
  const auto admitted = here.caller.call("/echo", &large);
  here.pump();
  CHECK(here.caller.exchange(admitted).messages().size() == 1);
  here.caller.write(begun, large.substr(100'000), true);
  here.pump();
  CHECK(here.caller.exchange(begun).messages().size() == 1);
  CHECK(here.caller.exchange(refused).status() == "8");

  here.at(std::chrono::milliseconds(900));
  here.caller.call("/echo", &large);
  here.pump();
  CHECK(ahead() == 1U << 10);
  here.at(std::chrono::milliseconds(1100));
  here.caller.call("/echo", &large);
  here.pump();
  CHECK(ahead() == options.stream_window);
  const auto last = here.caller.call("/echo", &large);
  here.pump();
  CHECK(here.caller.exchange(last).messages().size() == 1);
  CHECK(here.budget.lent() == 0);
}

namespace {

// How many bytes of each call's body have come.
std::vector<std::size_t> come(Harness& here, const std::vector<std::int32_t>& ids) {
  std::vector<std::size_t> sizes;
  for (const std::int32_t id : ids) {
    const auto sent = nghttp2_session_get_stream_remote_window_size(here.caller.session(), id);
    sizes.push_back(sent < 0 ? 0 : static_cast<std::size_t>(sent));
  }
  return sizes;
}

}  // namespace

TEST_CASE("bodies of many calls come by turns, as fast as they are wanted") {
  ConnectionOptions options;
  options.stream_window = 1U << 17;
  Harness here(options);
  here.caller.call("/refused");
  here.pump();
  here.service.wants = false;
  const std::string large = framed(std::string(800'000, 'y'));
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 6; ++i) ids.push_back(here.caller.call("/echo", &large));
  here.pump();
  // Each has sent what it may send ahead and holds little memory.
  CHECK(come(here, ids) == std::vector<std::size_t>(6, 0));
  CHECK(here.budget.lent() <= 6 * (1U << 10));
  for (const auto id : ids) CHECK(here.caller.exchange(id).messages().empty());

  here.service.wants = true;
  here.at(std::chrono::milliseconds(3));
  here.pump();
  for (const auto id : ids) CHECK(here.caller.exchange(id).messages().size() == 1);
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("who does not send when its turn has come keeps others waiting for a moment only") {
  ConnectionOptions options;
  options.stream_window = 1U << 17;
  Harness here(options);
  here.caller.call("/refused");
  here.pump();
  const std::string large = framed(std::string(3'000'000, 'y'));
  const auto slow = here.caller.call("/echo");
  here.caller.write(slow, large.substr(0, 100));
  here.pump();
  const auto next = here.caller.call("/echo", &large);
  here.pump();
  CHECK(here.caller.exchange(next).messages().empty());
  here.at(std::chrono::milliseconds(101));
  here.pump();
  CHECK(here.caller.exchange(next).messages().size() == 1);
  here.caller.write(slow, large.substr(100), true);
  here.pump();
  CHECK(here.caller.exchange(slow).messages().size() == 1);
}

TEST_CASE("calls that send nothing take no turns, and many of them make no connection narrow") {
  ConnectionOptions options;
  options.stream_window = 1U << 17;
  Harness here(options);
  for (int i = 0; i < 300; ++i) here.caller.call("/echo");
  here.pump();
  const std::string large = framed(std::string(100'000, 'y'));
  here.caller.call("/echo", &large);
  const std::string sent = here.caller.outgoing();
  CHECK(sent.size() > large.size());
  here.connection->receive(bytes_of(sent), here.now);
  here.caller.call("/refused");
  for (int i = 0; i < 300; ++i) here.caller.call("/echo");
  here.pump();
  const auto narrow = here.caller.call("/echo", &large);
  here.pump();
  CHECK(here.caller.exchange(narrow).messages().size() == 1);
}

TEST_CASE("many calls that are answered need no refusal to take turns") {
  ConnectionOptions options;
  options.stream_window = 1U << 17;
  Harness here(options);
  const std::string large = framed(std::string(300'000, 'y'));
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 64; ++i) ids.push_back(here.caller.call("/echo", &large));
  here.pump();
  for (const auto id : ids) CHECK(here.caller.exchange(id).messages().size() == 1);
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("an unknown method is UNIMPLEMENTED") {
  Harness here;
  const std::string body = framed("");
  const auto id = here.caller.call("/nosuch", &body);
  here.pump();
  CHECK(here.caller.exchange(id).status() == "12");
}

TEST_CASE("what is not gRPC hears so in HTTP's words") {
  Harness here;
  const std::string body;
  const auto get = here.caller.call("/echo", &body, {}, "GET");
  const auto json = here.caller.call("/echo", &body, {}, "POST", "application/json");
  const auto web = here.caller.call("/echo", &body, {}, "POST", "application/grpc-web");
  const auto proto = here.caller.call("/echo", &body, {}, "POST", "application/grpc+proto");
  here.pump();
  CHECK(here.caller.exchange(get).headers == Fields{{":status", "405"}, {"allow", "POST"}});
  CHECK(here.caller.exchange(json).field(":status") == "415");
  CHECK(here.caller.exchange(web).field(":status") == "415");
  CHECK(here.caller.exchange(proto).status() == "0");
  CHECK(here.caller.exchange(get).closed);
}

TEST_CASE("headers that make no sense are refused before the service hears of them") {
  Harness here;
  const std::string body = framed("x");
  const auto timeout = here.caller.call("/echo", &body, {{"grpc-timeout", "soon"}});
  const auto encoding = here.caller.call("/echo", &body, {{"grpc-encoding", "snappy"}});
  const auto past = here.caller.call("/echo", &body, {{"grpc-timeout", "0n"}});
  here.pump();
  CHECK(here.caller.exchange(timeout).status() == "13");
  CHECK(here.caller.exchange(encoding).status() == "12");
  CHECK(here.caller.exchange(encoding).field("grpc-accept-encoding") == "identity,deflate,gzip");
  CHECK(here.caller.exchange(past).status() == "4");
  CHECK(here.service.calls.empty());
  CHECK(here.service.counted.size() == 3);
}

TEST_CASE("metadata beyond the bound refuse the call, far beyond it the connection") {
  Harness here;
  const std::string body = framed("x");
  const auto more = here.caller.call("/echo", &body, {{"x-large", std::string(20'000, 'a')}});
  const auto fine = here.caller.call("/echo", &body, {{"x-large", std::string(10'000, 'a')}});
  here.pump();
  CHECK(here.caller.exchange(more).status() == "8");
  CHECK(here.caller.exchange(fine).status() == "0");
  Fields hopeless;
  for (int i = 0; i < 6; ++i) hopeless.emplace_back("x-large", std::string(12'000, 'b'));
  here.caller.call("/echo", &body, hopeless);
  here.pump();
  REQUIRE(here.caller.goaways.size() == 1);
  CHECK(here.caller.goaways[0].first == NGHTTP2_ENHANCE_YOUR_CALM);
  CHECK(here.connection->finished());
}

TEST_CASE("compressed messages are inflated") {
  for (const bool gzip : {true, false}) {
    Harness here;
    const std::string message(300'000, 'z');
    const std::string body =
        framed(deflated(message, gzip), true) + framed("plain") + framed(deflated("", gzip), true);
    const auto id =
        here.caller.call("/echo", &body, {{"grpc-encoding", gzip ? "gzip" : "deflate"}});
    here.pump(100);
    CHECK((here.caller.exchange(id).messages() == std::vector<std::string>{message, "plain", ""}));
    CHECK(here.caller.exchange(id).status() == "0");
    CHECK(here.budget.lent() == 0);
  }
}

TEST_CASE("a compressed message in a call that announced none is INTERNAL") {
  Harness here;
  const std::string body = framed(deflated("x", true), true);
  const auto id = here.caller.call("/echo", &body);
  here.pump();
  CHECK(here.caller.exchange(id).status() == "13");
  CHECK(here.service.log == Log{"end INTERNAL", "destroyed"});
}

TEST_CASE("messages that break the format end their call alone") {
  const std::string good = deflated("0123456789", true);
  const std::vector<std::pair<std::string, Fields>> broken{
      {std::string("\7\0\0\0\1x", 6), {}},
      {framed("no gzip", true), {{"grpc-encoding", "gzip"}}},
      {framed(good.substr(0, good.size() - 3), true), {{"grpc-encoding", "gzip"}}},
      {framed(good + "more", true), {{"grpc-encoding", "gzip"}}},
      {framed("", true), {{"grpc-encoding", "gzip"}}},
      {framed("cut short").substr(0, 9), {}},
      {std::string("\0\0", 2), {}},
  };
  for (const auto& [body, fields] : broken) {
    Harness here;
    const auto id = here.caller.call("/echo", &body, fields);
    here.pump(7);
    CHECK(here.caller.exchange(id).status() == "13");
    CHECK(here.service.log == Log{"end INTERNAL", "destroyed"});
    CHECK(here.budget.lent() == 0);
    const std::string next = framed("fine");
    const auto other = here.caller.call("/echo", &next);
    here.pump();
    CHECK(here.caller.exchange(other).status() == "0");
  }
}

TEST_CASE("a message larger than allowed is refused by its prefix, unread") {
  Harness here;
  here.service.max_message_bytes = 1000;
  const auto id = here.caller.call("/echo");
  here.caller.write(id, framed(std::string(1001, 'x')).substr(0, 5));
  here.pump();
  CHECK(here.caller.exchange(id).status() == "8");
  CHECK(here.caller.exchange(id).field("grpc-message") ==
        "Received message larger than max (1001 vs. 1000)");
  CHECK(here.caller.exchange(id).closed);
}

TEST_CASE("a bomb stops at the bound of messages and at the budget") {
  const std::string bomb = framed(deflated(std::string(50U << 20, '\0'), true), true);
  const Fields gzip{{"grpc-encoding", "gzip"}};
  Harness bounded;
  const auto id = bounded.caller.call("/echo", &bomb, gzip);
  bounded.pump();
  CHECK(bounded.caller.exchange(id).status() == "8");
  CHECK(bounded.caller.exchange(id).field("grpc-message").find("larger than max") !=
        std::string::npos);
  CHECK(bounded.budget.lent() == 0);

  Harness tight({}, {}, 1U << 20);
  tight.service.max_message_bytes = 1U << 30;
  const auto other = tight.caller.call("/echo", &bomb, gzip);
  tight.pump();
  CHECK(tight.caller.exchange(other).status() == "8");
  CHECK(tight.caller.exchange(other).field("grpc-message").starts_with("bytes in flight: "));
  CHECK(tight.budget.lent() == 0);
}

TEST_CASE("bytes are charged as they come, not as they are announced") {
  Harness here({}, {}, 1U << 20);
  here.service.max_message_bytes = 1U << 30;
  const auto id = here.caller.call("/silent");
  here.caller.write(id, framed(std::string(200U << 20, 'x')).substr(0, 5 + 1000));
  here.pump();
  CHECK(here.budget.lent() == 1000);
  here.caller.write(id, std::string(1'000'000, 'x'));
  here.pump();
  CHECK(here.budget.lent() == 1'001'000);
  here.caller.write(id, std::string(100'000, 'x'));
  here.pump();
  CHECK(here.caller.exchange(id).status() == "8");
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("a caller's reset ends its call") {
  Harness here;
  const auto id = here.caller.call("/silent");
  here.pump();
  CHECK_FALSE(here.service.calls[0]->ended());
  here.caller.reset(id);
  here.pump();
  CHECK(here.service.log == Log{"end CANCELLED", "destroyed"});
  CHECK(here.service.calls[0]->ended());
  CHECK(here.connection->open_calls() == 0);
  here.service.calls[0]->send(message_of("late"));
  here.service.calls[0]->finish({});
  CHECK(here.service.calls[0]->unsent() == 0);
  here.pump();
}

TEST_CASE("a lost connection ends its calls, and they outlive it") {
  Harness here;
  here.caller.call("/silent");
  here.caller.call("/silent");
  here.pump();
  here.connection->lost();
  CHECK(here.service.log == Log{"end CANCELLED", "destroyed", "end CANCELLED", "destroyed"});
  CHECK(here.connection->finished());
  here.hang_up();
  here.service.calls[0]->send(message_of("late"));
  here.service.calls[1]->finish({});
  here.service.calls[1]->resume();
  CHECK(here.service.calls[1]->ended());
  CHECK(here.waker.wakes == 0);
}

TEST_CASE("a finished call with a body under way is reset without an error") {
  Harness here;
  here.service.prepare = [](Recorder& recorder) {
    recorder.message_hook = [](Call& call, Bytes) {
      call.finish({Code::kInvalidArgument, "no: 100%\xC3\xA9\n", {}});
    };
  };
  const auto id = here.caller.call("/silent");
  here.caller.write(id, framed("first") + framed("second"));
  here.pump();
  Exchange& exchange = here.caller.exchange(id);
  CHECK(exchange.status() == "3");
  CHECK(exchange.field("grpc-message") == "no: 100%25%C3%A9%0A");
  CHECK(exchange.closed);
  CHECK(exchange.error == NGHTTP2_NO_ERROR);
  CHECK(here.service.log == Log{"message first", "end OK", "destroyed"});
}

TEST_CASE("what a handler throws is its call's status") {
  Harness here;
  here.service.prepare = [](Recorder& recorder) {
    recorder.message_hook = [](Call&, Bytes) {
      throw RequestError(Code::kNotFound, "model: given 'x'");
    };
  };
  const std::string body = framed("x");
  const auto id = here.caller.call("/echo", &body);
  here.pump();
  CHECK(here.caller.exchange(id).status() == "5");
}

TEST_CASE("answers wait for the caller's window, and others do not wait for them") {
  Harness here({}, {.reads = false, .window = 1000});
  const std::string large = framed(std::string(5000, 'x'));
  const std::string small = framed("y");
  const auto slow = here.caller.call("/echo", &large);
  const auto fast = here.caller.call("/echo", &small);
  here.pump();
  CHECK(here.caller.exchange(slow).data.size() == 1000);
  CHECK(here.service.calls[0]->unsent() == 4005);
  CHECK(here.caller.exchange(fast).status() == "0");
  for (int i = 0; i < 10; ++i) {
    here.caller.read_all(slow);
    here.pump();
  }
  CHECK(here.caller.exchange(slow).status() == "0");
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("answers of one connection take turns") {
  Harness here({}, {.window = 8U << 20});
  const std::string large = framed(std::string(3U << 20, 'x'));
  const std::string small = framed(std::string(100'000, 'y'));
  const auto first = here.caller.call("/echo", &large);
  const auto second = here.caller.call("/echo", &small);
  here.pump_to_server();
  here.pump_to_caller();
  here.pump_to_server();  // half a megabyte is what callers may send ahead
  while (!here.caller.exchange(second).ended) {
    here.pump_to_server();
    REQUIRE(here.pump_to_caller(200'000));
  }
  CHECK_FALSE(here.caller.exchange(first).ended);
  here.pump();
  CHECK(here.caller.exchange(first).status() == "0");
}

TEST_CASE("a message may be as large as allowed, compressed or not, and no larger") {
  for (const std::size_t size : {100'000, 100'001}) {
    for (const bool gzip : {false, true}) {
      Harness here;
      here.service.max_message_bytes = 100'000;
      const std::string message(size, 'x');
      const std::string body = gzip ? framed(deflated(message, true), true) : framed(message);
      const auto id = here.caller.call("/echo", &body, {{"grpc-encoding", "gzip"}});
      here.pump();
      CHECK(here.caller.exchange(id).status() == (size == 100'000 ? "0" : "8"));
    }
  }
}

TEST_CASE("a deadline is told even to a caller that reads nothing") {
  Harness here({}, {.reads = false, .window = 1000});
  const std::string body = framed(std::string(5000, 'x'));
  const auto id = here.caller.call("/echo", &body, {{"grpc-timeout", "100m"}});
  here.pump();
  CHECK(here.connection->next_timer() == here.start + std::chrono::milliseconds(100));
  here.at(std::chrono::milliseconds(100));
  here.pump();
  CHECK(here.caller.exchange(id).status() == "4");
  CHECK(here.service.log.at(2) == "end DEADLINE_EXCEEDED");
  CHECK(here.budget.lent() == 0);
  CHECK(here.connection->open_calls() == 0);
}

TEST_CASE("pieces of an answer are not copied") {
  Harness here;
  auto owner = std::make_shared<const std::string>(100'000, 'p');
  here.caller.call("/silent");
  here.pump();
  here.service.calls[0]->send({{{owner, bytes_of(*owner)}, {owner, bytes_of("tail")}}});
  here.connection->take_mail(here.now);
  std::array<iovec, 64> parts;
  const std::size_t count = here.connection->output(parts);
  std::size_t inside = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const auto* base = static_cast<const char*>(parts[i].iov_base);
    if (base >= owner->data() && base < owner->data() + owner->size()) inside += parts[i].iov_len;
  }
  CHECK(inside >= 65'535 - 4096);
  CHECK(owner.use_count() > 1);
  here.hang_up();
  CHECK(owner.use_count() == 1);
}

TEST_CASE("streamed answers leave before the call ends, and the handler hears when") {
  Harness here;
  const auto id = here.caller.call("/silent");
  here.pump();
  Call& call = *here.service.calls[0];
  call.send(message_of("one"));
  call.send(message_of("two"));
  CHECK(here.waker.wakes == 1);
  CHECK(call.unsent() == 16);
  here.connection->take_mail(here.now);
  here.pump();
  CHECK(here.caller.exchange(id).messages() == std::vector<std::string>{"one", "two"});
  CHECK(call.unsent() == 0);
  call.finish({});
  CHECK(here.waker.wakes == 2);
  here.connection->take_mail(here.now);
  here.pump();
  CHECK(here.caller.exchange(id).status() == "0");
  CHECK(here.service.log == Log{"all sent", "end OK", "destroyed"});
}

TEST_CASE("a paused call delivers nothing, keeps what came, and closes its window") {
  ConnectionOptions options;
  options.stream_window = 1U << 16;
  Harness here(options);
  here.service.prepare = [](Recorder& recorder) {
    recorder.message_hook = [](Call& call, Bytes) { call.pause(); };
  };
  const auto id = here.caller.call("/silent");
  std::string body;
  for (int i = 0; i < 1000; ++i) body += framed("message " + std::to_string(i));
  for (int i = 0; i < 100; ++i) body += framed(std::string(10'000, 'x'));
  here.caller.write(id, body, true);
  here.pump();
  CHECK(here.service.log == Log{"message message 0"});
  CHECK(here.budget.lent() > 0);
  CHECK(here.budget.lent() <= options.stream_window);
  for (int i = 1; i < 1100; ++i) {
    here.service.calls[0]->resume();
    here.connection->take_mail(here.now);
    here.pump();
    REQUIRE(here.service.log.size() == i + 1);
  }
  CHECK(here.service.log[999] == "message message 999");
  here.service.calls[0]->resume();
  here.connection->take_mail(here.now);
  CHECK(here.service.log.back() == "half close");
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("there are as many resumes as pauses") {
  Harness here;
  const auto id = here.caller.call("/silent");
  here.pump();
  Call& call = *here.service.calls[0];
  call.pause();
  call.pause();
  here.connection->take_mail(here.now);
  here.caller.write(id, framed("x"));
  here.pump();
  CHECK(here.service.log.empty());
  call.resume();
  here.connection->take_mail(here.now);
  CHECK(here.service.log.empty());
  call.resume();
  here.connection->take_mail(here.now);
  CHECK(here.service.log == Log{"message x"});
}

TEST_CASE("the service hears once that a round of reading is over") {
  Harness here;
  const std::string body = framed("x");
  for (int i = 0; i < 20; ++i) here.caller.call("/echo", &body);
  here.pump_to_server();
  CHECK(here.service.rounds == 1);
  CHECK(here.service.log.size() == 40);
}

TEST_CASE("request trailers end a body as its last DATA frame would") {
  Harness here;
  const auto id = here.caller.call("/echo");
  here.caller.write(id, framed("x"));
  here.pump();
  const nghttp2_nv field{reinterpret_cast<std::uint8_t*>(const_cast<char*>("x-end")),
                         reinterpret_cast<std::uint8_t*>(const_cast<char*>("1")), 5, 1, 0};
  nghttp2_submit_trailer(here.caller.session(), id, &field, 1);
  here.pump();
  CHECK(here.caller.exchange(id).status() == "0");
}

TEST_CASE("many calls of one connection end without leaving anything") {
  Harness here;
  const std::string body = framed("some message");
  for (int round = 0; round < 20; ++round) {
    std::vector<std::int32_t> ids;
    for (int i = 0; i < 100; ++i) ids.push_back(here.caller.call("/echo", &body));
    here.pump();
    for (const auto id : ids) REQUIRE(here.caller.exchange(id).status() == "0");
    here.service.calls.clear();
  }
  CHECK(here.connection->open_calls() == 0);
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("of a call whose caller is not known yet little is sent, until it is") {
  Harness here;
  here.service.unknown = true;
  const ConnectionOptions options;
  here.connect(options);
  here.pump();  // the caller has seen the settings
  std::shared_ptr<Call> unknown;
  here.service.prepare = [&](Recorder& handler) {
    handler.call->pause();
    unknown = handler.call;
  };
  const std::string large = framed(std::string(1U << 20, 'y'));
  const auto id = here.caller.call("/echo", &large);
  std::size_t sent = 0;
  for (std::string bytes = here.caller.outgoing(); !bytes.empty(); bytes = here.caller.outgoing()) {
    sent += bytes.size();
    here.connection->receive(bytes_of(bytes), here.now);
    here.pump_to_caller();
  }
  CHECK(sent < 2000);
  CHECK(here.service.log.empty());
  unknown->resume();
  here.connection->take_mail(here.now);
  here.service.prepare = nullptr;
  here.pump();
  CHECK(here.caller.exchange(id).messages().size() == 1);
  CHECK(here.budget.lent() == 0);
}

TEST_CASE("whoever is known is no longer kept short") {
  Harness here;
  here.service.unknown = true;
  here.connect({});
  here.pump();
  const auto ahead = [&] {
    return nghttp2_session_get_remote_settings(here.caller.session(),
                                               NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE);
  };
  CHECK(ahead() == 1U << 10);
  const std::string large = framed(std::string(1U << 20, 'y'));
  const auto id = here.caller.call("/echo", &large);
  here.pump();
  CHECK(here.caller.exchange(id).messages().size() == 1);
  here.at(std::chrono::milliseconds(1'100));
  here.caller.call("/echo", &large);
  here.pump();
  CHECK(ahead() == ConnectionOptions{}.stream_window);
}

}  // namespace attnserve::grpc::test
