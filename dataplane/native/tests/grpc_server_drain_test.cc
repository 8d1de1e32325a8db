// How servers end.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "grpc_echo_server.h"

using namespace attnserve;
using namespace attnserve::grpc;
using namespace std::chrono_literals;

TEST_CASE("a drain ends what is idle and takes nobody new") {
  Echo echo;
  Client idle(echo.address());
  idle.send("x");
  CHECK(idle.receive(1) == "x");
  const std::string address = echo.address();
  CHECK(echo.server->drain(5s));
  CHECK(idle.at_end());
  CHECK_THROWS(Client(address));
  CHECK(echo.record.drained == 1);
  CHECK(echo.record.lost == 0);
  CHECK(echo.server->connections() == 0);
  CHECK(echo.server->drain(0s));
}

TEST_CASE("a drain lets calls under way go on, and gives up at its timeout") {
  Echo echo;
  Client client(echo.address());
  client.send("?");
  CHECK(client.receive(1) == "?");
  CHECK(eventually([&] { return echo.server->open_calls() == 1; }));
  const TimePoint before = Clock::now();
  std::thread talker([&] {
    std::this_thread::sleep_for(50ms);
    client.send("still");
    CHECK(client.receive(5) == "still");
    CHECK(client.at_end());
  });
  CHECK_FALSE(echo.server->drain(200ms));
  CHECK(Clock::now() - before >= 200ms);
  talker.join();
  CHECK(echo.record.drained == 1);
  CHECK(echo.record.lost == 1);
  CHECK(echo.server->connections() == 0);
  CHECK(echo.server->open_calls() == 0);
}

TEST_CASE("a drain waits for whom it still writes to") {
  Echo echo;
  echo.record.most_unsent = 64U << 20;
  Client slow(resolve(echo.address()).front(), 4096);
  const std::string body(8U << 20, 'x');
  slow.send(body);
  CHECK(eventually([&] { return echo.record.received == body.size(); }));
  std::thread reader([&] {
    std::this_thread::sleep_for(100ms);
    CHECK(slow.receive(body.size()) == body);
    CHECK(slow.at_end());
    shutdown(slow.get(), SHUT_RDWR);
  });
  CHECK(echo.server->drain(10s));
  reader.join();
  CHECK(echo.record.lost == 0);
}

TEST_CASE("a server is destroyed at once, whatever is open") {
  auto echo = std::make_unique<Echo>();
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 20; ++i) {
    clients.push_back(std::make_unique<Client>(echo->address()));
    clients.back()->send("x");
    CHECK(clients.back()->receive(1) == "x");
  }
  echo->server.reset();
  CHECK(echo->record.lost == 20);
  for (const auto& client : clients) CHECK(client->at_end());
}
