// How many connections servers take.
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <string>
#include <vector>

#include "grpc_echo_server.h"

using namespace attnserve;
using namespace attnserve::grpc;
using namespace std::chrono_literals;

TEST_CASE("connections beyond the bound are closed at once, and those within live on") {
  Quiet quiet;
  ServerOptions options;
  options.max_connections = 3;
  Echo echo(options);
  std::vector<std::unique_ptr<Client>> inside;
  for (int i = 0; i < 3; ++i) inside.push_back(std::make_unique<Client>(echo.address()));
  CHECK(eventually([&] { return echo.server->connections() == 3; }));
  for (int i = 0; i < 100; ++i) CHECK(Client(echo.address()).at_end());
  for (const auto& client : inside) {
    client->send("here");
    CHECK(client->receive(4) == "here");
  }
  CHECK(quiet.count("connections refused") == 1);  // not once for each
  inside.pop_back();
  CHECK(eventually([&] { return answer_to(echo.address(), "x") == "x"; }));
}

TEST_CASE("the bound of one address leaves others their connections") {
  Quiet quiet;
  const Folder folder;
  ServerOptions options = on({"127.0.0.1:0", "unix:" + (folder.path / "s").string()});
  options.max_connections_per_address = 2;
  Echo echo(options);
  const std::vector<std::string> addresses = echo.server->addresses();
  Client one(addresses[0]);
  Client two(addresses[0]);
  CHECK(eventually([&] { return echo.server->connections() == 2; }));
  CHECK(Client(addresses[0]).at_end());
  CHECK(answer_to(addresses[1], "other") == "other");
}

TEST_CASE("the descriptor limit bounds connections, with a reserve") {
  Quiet quiet;
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  rlimit tight = before;
  tight.rlim_cur = 160;
  REQUIRE(setrlimit(RLIMIT_NOFILE, &tight) == 0);
  {
    // Half of the descriptors are the clients' of this very process.
    ServerOptions options;
    options.reserved_descriptors = 100;
    Echo echo(options);
    std::vector<std::unique_ptr<Client>> clients;
    for (int i = 0; i < 60; ++i) clients.push_back(std::make_unique<Client>(echo.address()));
    CHECK(eventually([&] { return clients.back()->at_end(); }));
    CHECK(echo.server->connections() < 60);
    CHECK(echo.server->connections() > 20);
    clients.front()->send("x");
    CHECK(clients.front()->receive(1) == "x");
  }
  tight.rlim_cur = 20;
  REQUIRE(setrlimit(RLIMIT_NOFILE, &tight) == 0);
  CHECK(reason_not_to_start(on({"127.0.0.1:0"})).find("descriptors leaves none") !=
        std::string::npos);
  REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
}

TEST_CASE(
    "without descriptors callers are turned away, no thread spins, and later ones are served") {
  Quiet quiet;
  Echo echo;
  Client early(echo.address());
  early.send("x");
  CHECK(early.receive(1) == "x");
  std::vector<Descriptor> waiting;
  for (int i = 0; i < 3; ++i) waiting.emplace_back(socket(AF_INET, SOCK_STREAM, 0));
  std::vector<Descriptor> hoard;
  for (;;) {
    Descriptor more(dup(early.get()));
    if (!more) break;
    hoard.push_back(std::move(more));
  }
  const SocketAddress address = resolve(echo.address()).front();
  const std::size_t rounds = echo.service.rounds;
  for (const Descriptor& each : waiting) {
    REQUIRE(connect(each.get(), address.get(), address.size) == 0);
  }
  for (const Descriptor& each : waiting) {
    pollfd waited{each.get(), POLLIN, 0};
    CHECK(poll(&waited, 1, Client::kPatience) == 1);
  }
  CHECK(echo.service.rounds - rounds < 100);
  CHECK(quiet.count("connections refused") == 1);
  early.send("y");
  CHECK(early.receive(1) == "y");
  hoard.clear();
  CHECK(answer_to(echo.address(), "x") == "x");
}
