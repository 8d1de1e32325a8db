#include "grpc/transport.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>
#include <utility>

namespace attnserve::grpc {
namespace {

class PlainTransport final : public Transport {
 public:
  using Transport::Transport;

  ReadResult read(MutableByteSpan into) override { return read_from_socket(descriptor(), into); }
  WriteResult write(std::span<const iovec> pieces) override {
    return write_to_socket(descriptor(), pieces);
  }
};

bool would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK; }

}  // namespace

void Transport::end_output() { shutdown(descriptor(), SHUT_WR); }

std::size_t Transport::unacknowledged() const {
  int size = 0;
  return ioctl(descriptor(), SIOCOUTQ, &size) == 0 ? static_cast<std::size_t>(size) : 0;
}

void Transport::discard_output() {
  const linger at_once{1, 0};
  setsockopt(descriptor(), SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
}

std::unique_ptr<Transport> plain_transport(Descriptor socket) {
  return std::make_unique<PlainTransport>(std::move(socket));
}

WriteResult write_to_socket(int descriptor, std::span<const iovec> pieces) {
  if (pieces.empty()) return {0, false, false};
  std::size_t size = 0;
  for (const iovec& piece : pieces) size += piece.iov_len;
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(pieces.data());  // sendmsg only reads them
  message.msg_iovlen = pieces.size();
  ssize_t sent = 0;
  do {
    sent = sendmsg(descriptor, &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0) return {0, would_block(errno), !would_block(errno)};
  // A socket that takes a part is full: asking again would only tell so.
  return {static_cast<std::size_t>(sent), static_cast<std::size_t>(sent) < size, false};
}

ReadResult read_from_socket(int descriptor, MutableByteSpan into) {
  ssize_t got = 0;
  do {
    got = recv(descriptor, into.data(), into.size(), 0);
  } while (got < 0 && errno == EINTR);
  if (got < 0) return {0, would_block(errno) ? ReadState::kDrained : ReadState::kBroken};
  if (got == 0) return {0, ReadState::kEnd};
  const auto size = static_cast<std::size_t>(got);
  // A stream that gives less than asked for has no more for now.
  return {size, size < into.size() ? ReadState::kDrained : ReadState::kMore};
}

}  // namespace attnserve::grpc
