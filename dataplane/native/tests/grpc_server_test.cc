// Sockets and threads, with connections that echo bytes.
#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/log.h"
#include "grpc_sockets.h"

using namespace attnserve;
using namespace attnserve::grpc;
using namespace std::chrono_literals;

namespace {

struct Echo {
  explicit Echo(ServerOptions options = {}) {
    if (options.addresses.empty()) options.addresses = {"127.0.0.1:0"};
    server = server_of(service, echo_factory(record), std::move(options));
    server->start();
  }
  std::string address() const { return server->addresses().front(); }

  NoService service;
  EchoRecord record;
  std::unique_ptr<Server> server;
};

ServerOptions on(std::vector<std::string> addresses) {
  ServerOptions options;
  options.addresses = std::move(addresses);
  return options;
}

std::string answer_to(const std::string& address, const std::string& question) {
  Client client(address);
  client.send(question);
  return client.receive(question.size());
}

// A folder of its own for sockets, removed with all in it.
struct Folder {
  Folder() {
    std::string name = "/tmp/attnserve-sockets-XXXXXX";
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { std::filesystem::remove_all(path); }
  std::filesystem::path path;
};

std::string reason_not_to_start(ServerOptions options) {
  NoService service;
  EchoRecord record;
  const auto server = server_of(service, echo_factory(record), std::move(options));
  try {
    server->start();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// Log events of a test's server are looked at, not printed.
struct Quiet {
  Quiet() {
    set_log_sink([this](const LogRecord& record) {
      const std::scoped_lock lock(mutex);
      ++events[std::string(record.event)];
    });
  }
  ~Quiet() { set_log_sink({}); }
  std::size_t count(const std::string& event) {
    const std::scoped_lock lock(mutex);
    return events[event];
  }
  std::mutex mutex;
  std::map<std::string, std::size_t> events;
};

}  // namespace

TEST_CASE("bytes go both ways over every kind of address") {
  const Folder folder;
  Echo echo(on({"127.0.0.1:0", "[::1]:0", "unix:" + (folder.path / "s").string(),
                "unix-abstract:attnserve-test-" + std::to_string(getpid())}));
  const std::vector<std::string> addresses = echo.server->addresses();
  REQUIRE(addresses.size() == 4);
  for (const std::string& address : addresses) {
    CHECK_FALSE(address.ends_with(":0"));
    CHECK(answer_to(address, "hello") == "hello");
  }
  const std::scoped_lock lock(echo.record.mutex);
  CHECK(echo.record.peers[0].starts_with("ipv4:127.0.0.1:"));
  CHECK(echo.record.peers[1].starts_with("ipv6:%5B::1%5D:"));
  CHECK(echo.record.peers[2] == "unix:");
  CHECK(echo.record.peers[3] == "unix:");
}

TEST_CASE("[::] takes IPv4 too and names it so; [::1] does not take its port of IPv4") {
  Echo echo(on({"[::]:0"}));
  const std::string port = echo.address().substr(echo.address().rfind(':'));
  CHECK(answer_to("127.0.0.1" + port, "four") == "four");
  CHECK(answer_to("[::1]" + port, "six") == "six");
  CHECK(echo.record.peers[0].starts_with("ipv4:127.0.0.1:"));
  Echo six(on({"[::1]:0"}));
  CHECK_THROWS(Client("127.0.0.1" + six.address().substr(six.address().rfind(':'))));
}

TEST_CASE("a host name is listened to at all its addresses, on one port") {
  Echo echo(on({"localhost:0"}));
  std::set<std::string> ports;
  for (const std::string& address : echo.server->addresses()) {
    ports.insert(address.substr(address.rfind(':')));
    CHECK(answer_to(address, "x") == "x");
  }
  CHECK(ports.size() == 1);
}

TEST_CASE("a server that cannot listen says where and why") {
  Echo echo;
  const std::string message = reason_not_to_start(on({echo.address()}));
  CHECK(message.find(echo.address()) != std::string::npos);
  CHECK(message.find("in use") != std::string::npos);
  CHECK(reason_not_to_start(on({"192.0.2.1:0"})).find("192.0.2.1:0") != std::string::npos);
  CHECK(reason_not_to_start(on({"unix:/no/such/folder/s"})).find("/no/such/folder/s") !=
        std::string::npos);
  CHECK(reason_not_to_start({}) == "there is no address to listen on");
}

TEST_CASE("a socket file is replaced only if nobody listens, and removed at the end") {
  const Folder folder;
  const std::string path = folder.path / "s";
  const std::string address = "unix:" + path;
  {
    // What a killed server leaves.
    SocketAddress stale = resolve(address).front();
    const Descriptor socket(::socket(AF_UNIX, SOCK_STREAM, 0));
    REQUIRE(bind(socket.get(), stale.get(), stale.size) == 0);
  }
  REQUIRE(std::filesystem::exists(path));
  {
    Echo echo(on({address}));
    CHECK(answer_to(address, "x") == "x");
    CHECK(reason_not_to_start(on({address})).find("in use") != std::string::npos);
    CHECK(answer_to(address, "still there") == "still there");
  }
  CHECK_FALSE(std::filesystem::exists(path));
  std::ofstream(path) << "a file of somebody";
  CHECK(reason_not_to_start(on({address})).find("in use") != std::string::npos);
  CHECK(std::filesystem::file_size(path) > 0);
}

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
  const double took = seconds(Clock::now() - before);
  CHECK(took >= 0.06);
  CHECK(took < 0.5);
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
  CHECK(Clock::now() - before < 2s);
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
  const TimePoint before = Clock::now();
  echo->server.reset();
  CHECK(Clock::now() - before < 1s);
  CHECK(echo->record.lost == 20);
  for (const auto& client : clients) CHECK(client->at_end());
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
