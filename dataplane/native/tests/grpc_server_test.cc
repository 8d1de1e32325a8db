// Sockets and threads, with connections that echo bytes.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "grpc_echo_server.h"

using namespace attnserve;
using namespace attnserve::grpc;
using namespace std::chrono_literals;

TEST_CASE("megabytes come back whole, also to callers who read late") {
  Echo echo;
  std::string sent;
  for (std::size_t i = 0; i < (12U << 20); ++i) sent += static_cast<char>('a' + i % 23);
  Client client(resolve(echo.address()).front(), 8192);
  std::thread sender([&] { client.send(sent); });
  std::this_thread::sleep_for(100ms);
  // By then the connection reads no more: what it holds is bounded.
  CHECK(client.receive(sent.size()) == sent);
  sender.join();
}

TEST_CASE("a caller who never reads delays nobody") {
  ServerOptions options;
  options.threads = 1;
  Echo echo(options);
  echo.record.most_unsent = 64 * 1024;
  Client stuck(resolve(echo.address()).front(), 4096);
  std::atomic<bool> done{false};
  std::thread sender([&] {
    const std::string chunk(64 * 1024, 'x');
    for (int i = 0; i < 400 && !done; ++i) {
      if (send(stuck.get(), chunk.data(), chunk.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        std::this_thread::sleep_for(1ms);
      }
    }
  });
  for (int i = 0; i < 50; ++i) CHECK(answer_to(echo.address(), "quick") == "quick");
  const std::size_t before = echo.service.rounds;
  done = true;
  sender.join();
  std::this_thread::sleep_for(50ms);
  const std::size_t settled = echo.service.rounds;
  std::this_thread::sleep_for(100ms);
  CHECK(echo.service.rounds <= settled + 2);  // nothing to do: no rounds, but for housekeeping
  CHECK(before > 0);
}

TEST_CASE("many connections are spread evenly over the threads") {
  Echo echo;
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 16; ++i) {
    clients.push_back(std::make_unique<Client>(echo.address()));
    clients.back()->send("x");
    CHECK(clients.back()->receive(1) == "x");
  }
  CHECK(echo.server->connections() == 16);
  std::map<std::thread::id, int> counts;
  const std::scoped_lock lock(echo.record.mutex);
  for (const std::thread::id thread : echo.record.threads) ++counts[thread];
  REQUIRE(counts.size() == 2);
  for (const auto& [thread, count] : counts) CHECK(count == 8);
}

TEST_CASE("mail from another thread is taken on the connection's own") {
  Echo echo;
  Client client(echo.address());
  client.send("x");
  CHECK(client.receive(1) == "x");
  for (std::size_t i = 1; i <= 100; ++i) {
    {
      const std::scoped_lock lock(echo.record.mutex);
      REQUIRE(echo.record.latest != nullptr);
      echo.record.waker->wake(*echo.record.latest);
    }
    CHECK(client.receive(4) == "mail");
    CHECK(echo.record.mails == i);
  }
}

TEST_CASE("a connection's timer comes when it is due") {
  Echo echo;
  echo.record.timer_milliseconds = 60;
  Client client(echo.address());
  const TimePoint before = Clock::now();
  client.send("x");
  CHECK(client.receive(6) == "xtimer");
  CHECK(seconds(Clock::now() - before) >= 0.06);
  CHECK(echo.record.timers == 1);
}

TEST_CASE("a connection that has said all is closed once the caller has it") {
  Echo echo;
  Client client(echo.address());
  client.send("goodbye!");
  CHECK(client.receive(8) == "goodbye!");
  CHECK(client.at_end());
  client.send("more that nobody wants");  // must not take the answer back
  CHECK(eventually([&] { return echo.server->connections() == 0; }));
  CHECK(echo.record.lost == 0);
}

TEST_CASE("a slow reader has all of the last answer, though it takes longer than goodbyes do") {
  Echo echo;
  echo.record.most_unsent = 64U << 20;
  Client slow(resolve(echo.address()).front(), 4096);
  const std::string body = std::string((2U << 20) - 1, 'x') + '!';
  slow.send(body);
  std::string got;
  while (got.size() < body.size()) {
    const std::string more = slow.receive(128 * 1024);
    if (more.empty()) break;
    got += more;
    slow.send(".");  // as callers do who give window back; a closed socket would answer by a reset
    std::this_thread::sleep_for(120ms);
  }
  CHECK(got == body);
  CHECK(slow.at_end());
}

TEST_CASE("a caller who is given up while the socket is full is closed at once") {
  Echo echo;
  echo.record.most_unsent = 64U << 20;
  echo.record.timer_milliseconds = 300;
  echo.record.timer_gives_up = true;
  Client stuck(resolve(echo.address()).front(), 4096);
  stuck.send(std::string(16U << 20, 'x'));
  CHECK(eventually([&] { return echo.server->connections() == 0; }));
  CHECK(echo.record.lost == 1);
}

TEST_CASE("a caller who goes is noticed at once") {
  Echo echo;
  {
    Client client(echo.address());
    client.send("x");
    CHECK(client.receive(1) == "x");
    CHECK(echo.server->connections() == 1);
  }
  CHECK(eventually([&] { return echo.server->connections() == 0; }));
  CHECK(echo.record.lost == 1);
}

TEST_CASE("threads carry names and take no signals") {
  Echo echo;
  std::set<std::string> names;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::getline(std::ifstream(task.path() / "comm"), name);
    if (!name.starts_with("grpc-")) continue;
    names.insert(name);
    std::ifstream status(task.path() / "status");
    for (std::string line; std::getline(status, line);) {
      if (line.starts_with("SigBlk:")) CHECK(line.find("fffffff") != std::string::npos);
    }
  }
  CHECK(names == std::set<std::string>{"grpc-0", "grpc-1"});
}

TEST_CASE("connections that come and go from many threads are all answered") {
  Echo echo;
  std::atomic<int> answered{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 50; ++k) {
        const std::string question = std::to_string(k) + (k % 2 != 0 ? "!" : "");
        if (answer_to(echo.address(), question) == question) ++answered;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(answered == 400);
  CHECK(eventually([&] { return echo.server->connections() == 0; }));
}
