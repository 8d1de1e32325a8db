#include "grpc/listener.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "base/text.h"

namespace attnserve::grpc {
namespace {

constexpr int kBacklog = 4096;
constexpr int kPortAttempts = 16;  // to find one that is free for all addresses of a name

// Why an address cannot be listened on, as listen() tells the reasons apart.
class ListenError : public std::runtime_error {
 public:
  ListenError(const SocketAddress& address, int reason)
      : std::runtime_error(text("address ", quoted(text_of(address)), ": ",
                                std::system_category().message(reason))),
        reason_(reason) {}
  int reason() const { return reason_; }

 private:
  int reason_;
};

std::string path_of(const SocketAddress& address) {
  if (address.family() != AF_UNIX) return {};
  return reinterpret_cast<const sockaddr_un&>(address.storage).sun_path;  // empty if abstract
}

// Whether the file at `path` is a socket whose process has gone.
bool is_stale(const SocketAddress& address, const std::string& path) {
  struct stat found{};
  if (lstat(path.c_str(), &found) != 0 || !S_ISSOCK(found.st_mode)) return false;
  const Descriptor probe(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  return probe && connect(probe.get(), address.get(), address.size) != 0 && errno == ECONNREFUSED;
}

void set_option(int descriptor, int level, int name, int value) {
  setsockopt(descriptor, level, name, &value, sizeof(value));
}

bool is_any_of_ipv6(const SocketAddress& address) {
  const auto& six = reinterpret_cast<const sockaddr_in6&>(address.storage);
  return address.family() == AF_INET6 && IN6_IS_ADDR_UNSPECIFIED(&six.sin6_addr);
}

// [::] on a machine without IPv6 is every address that it has.
SocketAddress any_of_ipv4(std::uint16_t port) {
  SocketAddress result;
  result.storage.ss_family = AF_INET;
  result.size = sizeof(sockaddr_in);
  result.set_port(port);
  return result;
}

bool is_missing_here(int reason) { return reason == EADDRNOTAVAIL || reason == EAFNOSUPPORT; }

// All on one port; nothing if that port, chosen by the system for the first, is taken at another.
std::optional<std::vector<Listener>> listen_on_all(const std::vector<SocketAddress>& addresses) {
  std::vector<Listener> listeners;
  std::optional<ListenError> missing;
  for (SocketAddress address : addresses) {
    const bool chosen = address.port() == 0 && !listeners.empty();
    if (chosen) address.set_port(listeners.front().address().port());
    try {
      listeners.emplace_back(address);
    } catch (const ListenError& error) {
      if (chosen && error.reason() == EADDRINUSE) return std::nullopt;
      if (addresses.size() == 1 || !is_missing_here(error.reason())) throw;
      missing = error;
    }
  }
  if (listeners.empty() && missing) throw ListenError(*missing);
  return listeners;
}

}  // namespace

SocketFile::SocketFile(std::string path) : path_(std::move(path)) {
  struct stat found{};
  if (lstat(path_.c_str(), &found) != 0) path_.clear();
  device_ = found.st_dev;
  inode_ = found.st_ino;
}

SocketFile::SocketFile(SocketFile&& other) noexcept
    : path_(std::exchange(other.path_, {})), device_(other.device_), inode_(other.inode_) {}

SocketFile& SocketFile::operator=(SocketFile&& other) noexcept {
  if (this != &other) {
    remove();
    path_ = std::exchange(other.path_, {});
    device_ = other.device_;
    inode_ = other.inode_;
  }
  return *this;
}

void SocketFile::remove() {
  if (path_.empty()) return;
  struct stat found{};
  if (lstat(path_.c_str(), &found) == 0 && found.st_dev == device_ && found.st_ino == inode_) {
    unlink(path_.c_str());
  }
  path_.clear();
}

Listener::Listener(const SocketAddress& asked) {
  try {
    bind(asked);
  } catch (const ListenError& error) {
    if (!is_any_of_ipv6(asked) || !is_missing_here(error.reason())) throw;
    bind(any_of_ipv4(asked.port()));
  }
  if (getsockname(descriptor(), address_.get(), &address_.size) != 0) {
    throw ListenError(asked, errno);
  }
}

void Listener::bind(const SocketAddress& asked) {
  descriptor_ = Descriptor(socket(asked.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!descriptor_) throw ListenError(asked, errno);
  if (asked.family() != AF_UNIX) set_option(descriptor(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (asked.family() == AF_INET6) {
    set_option(descriptor(), IPPROTO_IPV6, IPV6_V6ONLY, is_any_of_ipv6(asked) ? 0 : 1);
  }
  const std::string path = path_of(asked);
  int failure = ::bind(descriptor(), asked.get(), asked.size) == 0 ? 0 : errno;
  if (failure == EADDRINUSE && !path.empty() && is_stale(asked, path)) {
    unlink(path.c_str());
    failure = ::bind(descriptor(), asked.get(), asked.size) == 0 ? 0 : errno;
  }
  if (failure != 0) throw ListenError(asked, failure);
  if (!path.empty()) file_ = SocketFile(path);
  if (::listen(descriptor(), kBacklog) != 0) throw ListenError(asked, errno);
}

void Listener::close() {
  descriptor_.close();
  file_.remove();
}

std::vector<Listener> listen(const std::string& text) {
  const std::vector<SocketAddress> addresses = resolve(text);
  for (int attempt = 0; attempt < kPortAttempts; ++attempt) {
    if (auto listeners = listen_on_all(addresses)) return std::move(*listeners);
  }
  throw std::runtime_error(
      attnserve::text("address ", quoted(text), ": no port is free at all its addresses"));
}

}  // namespace attnserve::grpc
