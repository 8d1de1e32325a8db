#include <doctest/doctest.h>

#include <thread>

#include "services/stream_state.h"
#include "services/unary.h"
#include "services_support.h"

namespace attnserve::services {
namespace {

struct Stream {
  explicit Stream(CoreOptions options = {}) : core(options) {}

  std::shared_ptr<schedule::RequestContext> start() {
    auto request = std::make_shared<schedule::RequestContext>();
    state->begun();
    state->started(request);
    return request;
  }

  Core core;
  std::shared_ptr<NotedCall> call = std::make_shared<NotedCall>();
  std::shared_ptr<StreamState> state = StreamState::open(core, call, "Method");
};

Delivery failed(Code code) {
  Delivery delivery = delivered("failed");
  delivery.status.code = code;
  return delivery;
}

}  // namespace

TEST_CASE("a stream ends when it has been read and all its requests are answered") {
  Stream stream;
  const auto first = stream.start();
  stream.state->begun();
  stream.state->read_all();
  stream.state->answer(first, delivered("one"));
  CHECK_FALSE(stream.call->finished());
  stream.state->answer(nullptr, failed(Code::kInvalidArgument));
  REQUIRE(stream.call->finished());
  CHECK(stream.call->finished()->ok());
  CHECK(stream.call->sent() == std::vector<std::string>{"one", "failed"});
  CHECK(counted(stream.core, "Method", Code::kOk) == 1);
  CHECK(counted(stream.core, "Method", Code::kInvalidArgument) == 1);
}

TEST_CASE("a stream on which nothing was asked ends when it has been read") {
  Stream stream;
  stream.state->read_all();
  REQUIRE(stream.call->finished());
  CHECK(stream.call->finished()->ok());
}

TEST_CASE("a drain ends a stream after the answers that it is owed") {
  Stream stream;
  const auto request = stream.start();
  CHECK_FALSE(stream.state->draining());
  stream.core.streams.drain();
  CHECK(stream.state->draining());
  CHECK_FALSE(stream.call->finished());
  stream.state->answer(request, delivered("one"));
  REQUIRE(stream.call->finished());
  CHECK(stream.call->finished()->code == Code::kUnavailable);
  CHECK(stream.call->sent().size() == 1);
}

TEST_CASE("a stream that opens while the server drains ends at once") {
  Core core({});
  core.streams.drain();
  const auto call = std::make_shared<NotedCall>();
  const auto state = StreamState::open(core, call, "Method");
  REQUIRE(call->finished());
  CHECK(call->finished()->code == Code::kUnavailable);
}

TEST_CASE("a broken stream ends with its fault, once, and what runs for it is cancelled") {
  Stream stream;
  const auto request = stream.start();
  stream.state->fail({Code::kInvalidArgument, "broken", {}});
  stream.state->fail({Code::kInternal, "again", {}});
  CHECK(request->cancelled);
  REQUIRE(stream.call->finished());
  CHECK(stream.call->finished()->message == "broken");
  stream.state->answer(request, failed(Code::kCancelled));
  CHECK(stream.call->sent().empty());
  stream.state->ended(Code::kOk);
  CHECK(counted(stream.core, "Method", Code::kInvalidArgument) == 1);
  CHECK(counted(stream.core, "Method", Code::kInternal) == 0);
}

TEST_CASE("whoever leaves a stream has what runs for it cancelled, but not what was answered") {
  Stream stream;
  const auto answered = stream.start(), running = stream.start();
  stream.state->answer(answered, delivered("one"));
  stream.state->ended(Code::kCancelled);
  CHECK_FALSE(answered->cancelled);
  CHECK(running->cancelled);
  CHECK(counted(stream.core, "Method", Code::kCancelled) == 1);
  stream.core.streams.drain();  // which knows of it no more
  CHECK_FALSE(stream.call->finished());
}

TEST_CASE("a stream is read no further while as many requests as are allowed take room") {
  CoreOptions options;
  options.limits.max_stream_requests = 2;
  Stream stream(options);
  const auto first = stream.start();
  stream.state->pause_if_full();
  CHECK(stream.call->pauses() == 0);
  const auto second = stream.start();
  stream.state->pause_if_full();
  stream.state->pause_if_full();
  CHECK(stream.call->pauses() == 1);
  stream.state->answer(first, delivered("one"));
  CHECK(stream.call->pauses() == 1);  // its answer waits to be sent
  stream.state->all_sent();
  CHECK(stream.call->pauses() == 0);
  stream.state->all_sent();
  CHECK(stream.call->pauses() == 0);
  stream.state->answer(second, delivered("two"));
}

TEST_CASE("answers come from many threads, each whole") {
  constexpr int kThreads = 4, kEach = 200;
  Stream stream;
  for (int i = 0; i < kThreads * kEach; ++i) stream.state->begun();
  stream.state->read_all();
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&stream, thread] {
      for (int i = 0; i < kEach; ++i) {
        Delivery delivery = delivered(std::to_string(thread));
        delivery.messages.push_back(OutMessage::of(bytes_of(std::to_string(thread))));
        stream.state->answer(nullptr, std::move(delivery));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::vector<std::string> sent = stream.call->sent();
  REQUIRE(sent.size() == 2 * kThreads * kEach);
  for (std::size_t at = 0; at < sent.size(); at += 2) CHECK(sent[at] == sent[at + 1]);
  CHECK(stream.call->finished());
}

TEST_CASE("a unary answer is given and counted once, whoever comes first") {
  Core core({});
  const auto call = std::make_shared<NotedCall>();
  Reply reply(core, call, "Method");
  CHECK_FALSE(reply.over());
  reply.deliver(delivered("one"));
  CHECK(reply.over());
  reply.deliver(failed(Code::kInternal));
  reply.ended(Code::kCancelled);
  CHECK(call->sent() == std::vector<std::string>{"one"});
  CHECK(call->finished()->ok());
  CHECK(core.statistics.requests().size() == 1);
  CHECK(counted(core, "Method", Code::kOk) == 1);
}

TEST_CASE("a unary call without a message, or whose behaviour throws, is answered so") {
  Core core({});
  const auto refuse = [](Bytes, const std::shared_ptr<Reply>&,
                         const std::shared_ptr<schedule::RequestContext>&,
                         Admitted) { throw RequestError(Code::kNotFound, "nothing here"); };
  const auto empty = std::make_shared<NotedCall>(), asked = std::make_shared<NotedCall>();
  unary_handler(core, empty, "Method", {}, refuse)->on_half_close();
  CHECK(empty->finished()->message == "message: given nothing; allowed: one request of Method");
  auto place = std::get<Admitted>(Admitted::admit(core, Clock::now(), kNever));
  const auto handler = unary_handler(core, asked, "Method", std::move(place), refuse);
  CHECK(core.admission.arriving() == 1);
  handler->on_message(bytes_of("asked"));
  CHECK(asked->finished()->code == Code::kNotFound);
  CHECK(core.admission.arriving() == 0);
  CHECK(core.admission.inside() == 0);
}

}  // namespace attnserve::services
