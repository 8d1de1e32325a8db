// The outgoing side of a call: messages that wait for their turn on the connection.
#pragma once

#include <array>
#include <cstddef>
#include <memory>

#include "base/memory.h"
#include "grpc/fifo.h"
#include "grpc/message_reader.h"
#include "grpc/output_queue.h"

namespace attnserve::grpc {

// Messages and their prefixes as one run of bytes, of which DATA frames take as many as flow
// control lets them.
class Answer {
 public:
  void push(OutMessage message);
  std::size_t waiting() const { return waiting_; }  // bytes, prefixes included

  // Moves the next `size` bytes, at most `waiting()`, into the queue: the payload of one frame.
  void move_to(OutputQueue& queue, std::size_t size);
  // Drops what waits. What the queue refers to stays alive until it is written.
  void drop(OutputQueue& queue);

 private:
  struct Waiting {
    std::array<std::byte, kPrefixBytes> prefix;
    OutMessage message;
  };

  std::size_t move_prefix(OutputQueue& queue, const Waiting& first, std::size_t size);
  std::size_t move_piece(OutputQueue& queue, Waiting& first, std::size_t size);
  void next_if_done();

  Fifo<Waiting> messages_;
  std::size_t waiting_ = 0;
  // How far the first message has been moved.
  std::size_t prefix_moved_ = 0;
  std::size_t piece_ = 0;
  std::size_t piece_moved_ = 0;
};

}  // namespace attnserve::grpc
