// Socket addresses and how they are written.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

namespace attnserve::grpc {

// Room for an address of any family; a value.
struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = sizeof(sockaddr_storage);

  int family() const { return storage.ss_family; }
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  std::uint16_t port() const;  // 0 for sockets of the file system
  void set_port(std::uint16_t port);
};

// What "HOST:PORT", "[IPV6]:PORT", "unix:PATH" or "unix-abstract:NAME" stands for; a host name may
// stand for several. Throws std::runtime_error that names the text and the reason.
std::vector<SocketAddress> resolve(const std::string& text);

std::string text_of(const SocketAddress& address);  // as resolve takes it, host in numbers

// As gRPC names the other side of a connection: "ipv4:127.0.0.1:4242", "ipv6:%5B::1%5D:4242",
// "unix:". IPv4 by way of an IPv6 socket is written as IPv4.
std::string peer_of(const SocketAddress& address);

// The same without the port: what connections of one caller have in common.
std::string host_of(const SocketAddress& address);

}  // namespace attnserve::grpc
