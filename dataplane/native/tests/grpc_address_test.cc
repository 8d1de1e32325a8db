#include <doctest/doctest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "grpc/address.h"

using namespace attnserve::grpc;

namespace {

std::string only(const std::string& text) {
  const auto found = resolve(text);
  REQUIRE(found.size() == 1);
  return text_of(found.front());
}

std::string refusal(const std::string& text) {
  try {
    resolve(text);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("addresses are written as they are read") {
  for (const char* text : {"127.0.0.1:8001", "0.0.0.0:0", "[::]:8001", "[::1]:65535",
                           "unix:/run/attnserve.sock", "unix:relative", "unix-abstract:name"}) {
    CHECK(only(text) == text);
  }
  CHECK(only("unix:///run/attnserve.sock") == "unix:/run/attnserve.sock");
}

TEST_CASE("a host name stands for all its addresses, each once") {
  const auto found = resolve("localhost:81");
  REQUIRE_FALSE(found.empty());
  for (const auto& each : found) {
    const std::string text = text_of(each);
    CHECK((text == "127.0.0.1:81" || text == "[::1]:81"));
  }
}

TEST_CASE("what is no address is refused by name") {
  for (const char* text : {"", "host", ":80", "host:", "host:x", "host:-1", "::1:80", "[]:80",
                           "1.2.3.4:123456", "host: 80"}) {
    const std::string message = refusal(text);
    CHECK(message.find('\'' + std::string(text) + '\'') != std::string::npos);
    CHECK(message.find("allowed: HOST:PORT") != std::string::npos);
  }
  CHECK(refusal("1.2.3.4:65536").find("at most 65535") != std::string::npos);
  CHECK(refusal("unix:").find("empty") != std::string::npos);
  CHECK(refusal("unix:" + std::string(200, 'x')).find("at most 107 bytes") != std::string::npos);
  CHECK(refusal("no-such-host.invalid:1").find("no-such-host.invalid") != std::string::npos);
}

TEST_CASE("peers are named as gRPC names them") {
  CHECK(peer_of(resolve("127.0.0.1:4242").front()) == "ipv4:127.0.0.1:4242");
  CHECK(peer_of(resolve("[::1]:4242").front()) == "ipv6:%5B::1%5D:4242");
  CHECK(peer_of(resolve("unix:/x").front()) == "unix:");
  CHECK(host_of(resolve("127.0.0.1:4242").front()) == "ipv4:127.0.0.1");
  CHECK(host_of(resolve("[::1]:4242").front()) == "ipv6:%5B::1%5D");
  SocketAddress unnamed;  // the usual client of a unix socket
  unnamed.storage.ss_family = AF_UNIX;
  unnamed.size = sizeof(sa_family_t);
  CHECK(peer_of(unnamed) == "unix:");
  CHECK(text_of(unnamed) == "unix:");
}

TEST_CASE("IPv4 by way of an IPv6 socket is IPv4, for names and for limits") {
  const SocketAddress mapped = resolve("[::ffff:10.1.2.3]:77").front();
  CHECK(peer_of(mapped) == "ipv4:10.1.2.3:77");
  CHECK(host_of(mapped) == "ipv4:10.1.2.3");
}
