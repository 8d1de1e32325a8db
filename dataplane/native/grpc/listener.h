// Sockets that listen.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "grpc/address.h"
#include "grpc/descriptor.h"

namespace attnserve::grpc {

// The file that a bound socket leaves in the file system: removed on destruction, unless another
// socket has taken its place by then.
class SocketFile {
 public:
  SocketFile() = default;
  explicit SocketFile(std::string path);
  SocketFile(SocketFile&& other) noexcept;
  SocketFile& operator=(SocketFile&& other) noexcept;
  ~SocketFile() { remove(); }
  void remove();

 private:
  std::string path_;  // empty: there is no file
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

// A bound socket that listens and does not block.
class Listener {
 public:
  // Throws std::runtime_error that names the address and the reason. A socket file that nobody
  // listens on is replaced.
  explicit Listener(const SocketAddress& address);

  int descriptor() const { return descriptor_.get(); }  // -1 once it is closed
  void close();
  const SocketAddress& address() const { return address_; }  // port filled in

 private:
  void bind(const SocketAddress& address);

  SocketFile file_;  // removed after the socket has been closed
  Descriptor descriptor_;
  SocketAddress address_;
};

// One for each address that `text` (see resolve) stands for; all on one port where it asks for any.
// Of the addresses of a host name those that this machine lacks are left out.
std::vector<Listener> listen(const std::string& text);

}  // namespace attnserve::grpc
