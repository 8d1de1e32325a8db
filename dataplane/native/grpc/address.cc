#include "grpc/address.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>

#include "base/text.h"

namespace attnserve::grpc {
namespace {

constexpr std::string_view kUnix = "unix:";
constexpr std::string_view kUnixAbstract = "unix-abstract:";
constexpr std::size_t kPathOffset = offsetof(sockaddr_un, sun_path);

[[noreturn]] void refuse(const std::string& address, std::string_view reason) {
  throw std::runtime_error(text("address ", quoted(address), ": ", reason));
}

SocketAddress unix_address(const std::string& address, std::string_view path, bool abstract) {
  SocketAddress result;
  auto& name = reinterpret_cast<sockaddr_un&>(result.storage);
  // One byte is taken by the zero before an abstract name, or after a path.
  const std::size_t most = sizeof(name.sun_path) - 1;
  if (path.empty()) refuse(address, "the name after the colon is empty");
  if (path.size() > most) refuse(address, text("a socket's name has at most ", most, " bytes"));
  name.sun_family = AF_UNIX;
  std::copy(path.begin(), path.end(), name.sun_path + (abstract ? 1 : 0));
  result.size = static_cast<socklen_t>(kPathOffset + path.size() + 1);
  return result;
}

struct HostAndPort {
  std::string host;
  std::string port;
};

HostAndPort split(const std::string& address) {
  const std::size_t colon = address.rfind(':');
  std::string host = address.substr(0, colon);
  const std::string port = colon == std::string::npos ? "" : address.substr(colon + 1);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  const bool digits =
      !port.empty() && port.size() <= 5 &&
      std::all_of(port.begin(), port.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (host.empty() || !digits || (!bracketed && host.find_first_of(":[]") != std::string::npos)) {
    refuse(address, "allowed: HOST:PORT, [IPV6]:PORT, unix:PATH, unix-abstract:NAME");
  }
  if (std::stoi(port) > 65535) refuse(address, "a port is at most 65535");
  return {std::move(host), port};
}

// An address of IPv4 that an IPv6 socket shows as ::ffff:a.b.c.d, as what it is.
SocketAddress unmapped(const SocketAddress& address) {
  const auto& six = reinterpret_cast<const sockaddr_in6&>(address.storage);
  if (address.family() != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&six.sin6_addr)) return address;
  SocketAddress result;
  auto& four = reinterpret_cast<sockaddr_in&>(result.storage);
  four.sin_family = AF_INET;
  four.sin_port = six.sin6_port;
  std::memcpy(&four.sin_addr, six.sin6_addr.s6_addr + 12, sizeof(four.sin_addr));
  result.size = sizeof(sockaddr_in);
  return result;
}

std::string host_in_numbers(const SocketAddress& address) {
  std::array<char, NI_MAXHOST> host{};
  if (getnameinfo(address.get(), address.size, host.data(), host.size(), nullptr, 0,
                  NI_NUMERICHOST) != 0) {
    return "unknown";
  }
  return host.data();
}

std::string percent_encoded_zone(std::string host) {
  const std::size_t percent = host.find('%');
  if (percent != std::string::npos) host.replace(percent, 1, "%25");
  return host;
}

}  // namespace

std::uint16_t SocketAddress::port() const {
  if (family() == AF_INET) return ntohs(reinterpret_cast<const sockaddr_in&>(storage).sin_port);
  if (family() == AF_INET6) return ntohs(reinterpret_cast<const sockaddr_in6&>(storage).sin6_port);
  return 0;
}

void SocketAddress::set_port(std::uint16_t port) {
  if (family() == AF_INET) reinterpret_cast<sockaddr_in&>(storage).sin_port = htons(port);
  if (family() == AF_INET6) reinterpret_cast<sockaddr_in6&>(storage).sin6_port = htons(port);
}

std::vector<SocketAddress> resolve(const std::string& address) {
  if (address.starts_with(kUnixAbstract)) {
    return {unix_address(address, std::string_view(address).substr(kUnixAbstract.size()), true)};
  }
  if (address.starts_with(kUnix)) {
    std::string_view path = std::string_view(address).substr(kUnix.size());
    if (path.starts_with("///")) path.remove_prefix(2);  // unix:///run/x is /run/x
    return {unix_address(address, path, false)};
  }
  const HostAndPort asked = split(address);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* first = nullptr;
  const int failure = getaddrinfo(asked.host.c_str(), asked.port.c_str(), &hints, &first);
  if (failure != 0) refuse(address, gai_strerror(failure));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(first, &freeaddrinfo);
  std::vector<SocketAddress> found;
  for (const addrinfo* each = first; each != nullptr; each = each->ai_next) {
    SocketAddress candidate;
    std::memcpy(&candidate.storage, each->ai_addr, each->ai_addrlen);
    candidate.size = each->ai_addrlen;
    const bool known = std::any_of(found.begin(), found.end(), [&](const SocketAddress& other) {
      return text_of(other) == text_of(candidate);
    });
    if (!known) found.push_back(candidate);
  }
  return found;
}

std::string text_of(const SocketAddress& address) {
  if (address.family() == AF_UNIX) {
    const auto& name = reinterpret_cast<const sockaddr_un&>(address.storage);
    if (address.size <= kPathOffset) return std::string(kUnix);
    const std::string_view bytes(name.sun_path, address.size - kPathOffset);
    if (bytes.front() == '\0') return text(kUnixAbstract, bytes.substr(1));
    return text(kUnix, bytes.substr(0, bytes.find('\0')));
  }
  const std::string host = host_in_numbers(address);
  if (address.family() == AF_INET6) return text('[', host, "]:", address.port());
  return text(host, ':', address.port());
}

std::string peer_of(const SocketAddress& address) {
  if (address.family() == AF_UNIX) return std::string(kUnix);
  return text(host_of(address), ':', unmapped(address).port());
}

std::string host_of(const SocketAddress& address) {
  if (address.family() == AF_UNIX) return std::string(kUnix);
  const SocketAddress real = unmapped(address);
  const std::string host = host_in_numbers(real);
  if (real.family() == AF_INET6) return text("ipv6:%5B", percent_encoded_zone(host), "%5D");
  return text("ipv4:", host);
}

}  // namespace attnserve::grpc
