#include "grpc/acceptor.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include "base/log.h"

namespace attnserve::grpc {
namespace {

constexpr int kAcceptsPerRound = 64;
constexpr Duration kPause = std::chrono::milliseconds(100);
constexpr Duration kTellingInterval = std::chrono::seconds(10);

Descriptor open_spare() { return Descriptor(open("/dev/null", O_RDONLY | O_CLOEXEC)); }

// Never the same twice in a process, whichever server and loop.
std::uint64_t next_number() {
  static std::atomic<std::uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

bool lacks_resources(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

}  // namespace

Acceptor::Acceptor(Loop& loop, Listener listener, Places& places, const TlsContext* tls,
                   HandOver hand_over)
    : loop_(loop),
      listener_(std::move(listener)),
      places_(places),
      tls_(tls),
      hand_over_(std::move(hand_over)),
      spare_(open_spare()) {}

void Acceptor::start() { loop_.watch(listener_.descriptor(), EPOLLIN, *this); }

void Acceptor::stop() {
  if (listener_.descriptor() < 0) return;
  loop_.unwatch(listener_.descriptor(), *this);
  listener_.close();
}

void Acceptor::ready(std::uint32_t, TimePoint now) {
  for (int i = 0; i < kAcceptsPerRound && accept_one(now); ++i) {
  }
}

// False if nobody else can be accepted now.
bool Acceptor::accept_one(TimePoint now) {
  SocketAddress from;
  Descriptor socket(
      accept4(listener_.descriptor(), from.get(), &from.size, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (socket) {
    welcome(std::move(socket), from, now);
    return true;
  }
  if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
  if (!lacks_resources(errno)) return true;  // this one is gone; there may be others
  turn_one_away(now);
  return false;
}

void Acceptor::welcome(Descriptor socket, const SocketAddress& from, TimePoint now) {
  try {
    std::optional<Place> place = places_.take(host_of(from));
    if (!place) {
      tell_of_refusals("too many connections", now);
      return;
    }
    const int one = 1;
    if (from.family() != AF_UNIX) {
      setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    }
    std::unique_ptr<Transport> transport =
        tls_ != nullptr ? tls_->accept(std::move(socket)) : plain_transport(std::move(socket));
    hand_over_({std::move(*place), std::move(transport), next_number(), peer_of(from)});
  } catch (const std::bad_alloc&) {
    tell_of_refusals("no memory for a connection", now);
  }
}

// Without a descriptor to accept with, who is first in line is closed by means of the spare one;
// the next are looked at after a pause, since the shortage will not be over at once.
void Acceptor::turn_one_away(TimePoint now) {
  spare_.close();
  Descriptor(accept4(listener_.descriptor(), nullptr, nullptr, SOCK_CLOEXEC)).close();
  spare_ = open_spare();
  tell_of_refusals("no descriptors or memory are left", now);
  pause(now);
}

void Acceptor::pause(TimePoint now) {
  loop_.rewatch(listener_.descriptor(), 0, *this);
  loop_.schedule(*this, now + kPause);
}

void Acceptor::expire(TimePoint) { loop_.rewatch(listener_.descriptor(), EPOLLIN, *this); }

void Acceptor::tell_of_refusals(const char* reason, TimePoint now) {
  ++refused_;
  if (now < next_telling_) return;
  next_telling_ = now + kTellingInterval;
  log(Level::kWarning, "connections refused",
      {{"reason", reason},
       {"address", text_of(listener_.address())},
       {"count", std::to_string(std::exchange(refused_, 0))}});
}

}  // namespace attnserve::grpc
