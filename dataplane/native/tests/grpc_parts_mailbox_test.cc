// Calls used from other threads than their connection's.
#include <doctest/doctest.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "grpc_harness.h"

namespace attnserve::grpc::test {

namespace {

// A loop of one connection: sleeps until it is woken.
struct Sleeper : Waker {
  void wake(Connection&) override {
    {
      const std::lock_guard lock(mutex);
      woken = true;
    }
    condition.notify_one();
  }
  bool wait() {
    std::unique_lock lock(mutex);
    condition.wait_for(lock, std::chrono::seconds(10), [this] { return woken; });
    return std::exchange(woken, false);
  }

  std::mutex mutex;  // guards woken
  std::condition_variable condition;
  bool woken = false;
};

}  // namespace

TEST_CASE(
    "messages of many threads arrive whole, each thread's in its order, and nothing is lost") {
  constexpr int kThreads = 4;
  constexpr int kMessages = 2000;
  ByteBudget budget(64U << 20);
  TestService service;
  Sleeper sleeper;
  Caller caller;
  const TimePoint now{std::chrono::hours(1)};
  auto connection =
      Connection::create(service, budget, sleeper, ConnectionOptions{}, 1, "unix:", now);
  const auto pump = [&] {
    connection->receive(bytes_of(caller.outgoing()), now);
    std::array<iovec, 16> parts;
    while (const std::size_t count = connection->output(parts)) {
      for (std::size_t i = 0; i < count; ++i) {
        const std::string bytes(static_cast<const char*>(parts[i].iov_base), parts[i].iov_len);
        connection->written(bytes.size(), now);
        caller.receive(bytes);
        break;
      }
    }
  };
  const auto id = caller.call("/silent");
  pump();
  const std::shared_ptr<Call> call = service.calls.at(0);
  std::atomic<int> running{kThreads};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < kMessages; ++i) {
        call->send(message_of(std::to_string(thread) + ":" + std::to_string(i)));
        if (i % 7 == 0) call->pause();
        if (i % 7 == 1) call->resume();
        CHECK(call->unsent() < (1U << 20));
      }
      if (running.fetch_sub(1) == 1) call->finish({});
    });
  }
  while (!call->ended()) {
    REQUIRE(sleeper.wait());
    connection->take_mail(now);
    pump();
    pump();
  }
  for (std::thread& thread : threads) thread.join();
  const std::vector<std::string> messages = caller.exchange(id).messages();
  CHECK(messages.size() == kThreads * kMessages);
  std::array<int, kThreads> next{};
  for (const std::string& message : messages) {
    const int thread = message[0] - '0';
    REQUIRE(message.substr(2) == std::to_string(next[thread]++));
  }
  CHECK(caller.exchange(id).status() == "0");
}

TEST_CASE("calls may be used while their connection goes away") {
  for (int round = 0; round < 50; ++round) {
    Harness here;
    here.caller.call("/silent");
    here.pump();
    const std::shared_ptr<Call> call = here.service.calls.at(0);
    std::thread user([&] {
      while (!call->ended()) {
        call->send(message_of("x"));
        call->pause();
        call->resume();
      }
      call->finish({});
    });
    for (int i = 0; i < 10; ++i) {
      here.connection->take_mail(here.now);
      here.pump();
    }
    here.hang_up();
    user.join();
    CHECK(call->unsent() == 0);
  }
}

TEST_CASE("the connection's thread is not woken by itself") {
  Harness here;
  const std::string body = framed("x");
  here.caller.call("/echo", &body);
  here.pump();
  CHECK(here.waker.wakes == 0);
}

TEST_CASE("a thread that asks for much wakes the connection once") {
  Harness here;
  here.caller.call("/silent");
  here.pump();
  std::thread([&] {
    for (int i = 0; i < 10; ++i) here.service.calls[0]->send(message_of("x"));
    here.service.calls[0]->finish({});
  }).join();
  CHECK(here.waker.wakes == 1);
  here.connection->take_mail(here.now);
  here.pump();
  CHECK(here.caller.exchange(1).messages().size() == 10);
}

TEST_CASE("a handler that finishes hears of no further message") {
  Harness here;
  here.service.prepare = [](Recorder& recorder) {
    recorder.message_hook = [](Call& call, Bytes) { call.finish({}); };
  };
  const auto id = here.caller.call("/silent");
  here.pump();
  here.service.calls[0]->pause();
  here.connection->take_mail(here.now);
  here.caller.write(id, framed("1") + framed("2") + framed("3"), true);
  here.pump();
  here.service.calls[0]->resume();
  here.connection->take_mail(here.now);
  here.pump();
  CHECK(here.service.log == Recorder::Log{"message 1", "end OK", "destroyed"});
}

}  // namespace attnserve::grpc::test
