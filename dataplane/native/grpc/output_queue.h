// Bytes on their way to the socket, in order, as one list of parts.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/memory.h"
#include "grpc/fifo.h"

namespace attnserve::grpc {

class Stream;

// Frame headers are copied into small blocks of the queue's own, payloads are referred to. What is
// to happen once the socket has taken everything up to here is a mark.
class OutputQueue {
 public:
  struct Mark {
    std::shared_ptr<Stream> stream;     // whose answer the bytes before it are
    std::size_t size = 0;               // how many of that stream's bytes have been written with it
    bool end = false;                   // they were the last, trailers included
    std::shared_ptr<const void> owner;  // of payload that is needed no longer
  };

  void copy(ByteSpan bytes);
  void refer(ByteSpan bytes);  // they live until a mark after them lets go of their owner
  void mark(Mark mark);

  bool empty() const { return written_ == appended_; }
  std::size_t size() const { return static_cast<std::size_t>(appended_ - written_); }
  std::size_t parts() const { return parts_.items().size(); }
  // Fills in as many parts as there are and fit; the number of them.
  std::size_t fill(std::span<iovec> into) const;

  // The socket took so many bytes, at most `size()`.
  void written(std::size_t size);
  // The next mark that has been reached, taken out; false: none. They come in order.
  bool reached(Mark& mark);

 private:
  struct Block {
    std::unique_ptr<std::byte[]> memory;
    std::size_t capacity = 0;
    std::size_t used = 0;
    std::uint64_t end = 0;  // position after its last byte: free once that is written
  };
  struct Placed {
    std::uint64_t position;
    Mark mark;
  };

  std::byte* room(std::size_t size);
  void append(const std::byte* data, std::size_t size);
  void free_blocks();

  Fifo<iovec> parts_;
  Fifo<Placed> marks_;
  std::vector<Block> blocks_;   // the last one is being filled
  std::uint64_t appended_ = 0;  // positions: bytes since the beginning
  std::uint64_t written_ = 0;
};

}  // namespace attnserve::grpc
