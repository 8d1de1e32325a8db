// Where servers listen.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <string>

#include "grpc_echo_server.h"

using namespace attnserve;
using namespace attnserve::grpc;
using namespace std::chrono_literals;

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
