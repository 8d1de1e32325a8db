#include "grpc/answer.h"

#include <algorithm>
#include <utility>

namespace attnserve::grpc {

namespace {

// Pieces so short are copied: an entry of their own in a vector of writes costs more.
constexpr std::size_t kCopied = 256;

std::array<std::byte, kPrefixBytes> prefix_of(std::size_t size) {
  const auto byte = [size](unsigned shift) { return static_cast<std::byte>(size >> shift); };
  return {std::byte{0}, byte(24), byte(16), byte(8), byte(0)};
}

}  // namespace

void Answer::push(OutMessage message) {
  const std::size_t size = message.size();
  messages_.push({prefix_of(size), std::move(message)});
  waiting_ += kPrefixBytes + size;
}

void Answer::move_to(OutputQueue& queue, std::size_t size) {
  waiting_ -= size;
  while (size > 0) {
    Waiting& first = messages_.front();
    size -= prefix_moved_ < kPrefixBytes ? move_prefix(queue, first, size)
                                         : move_piece(queue, first, size);
    next_if_done();
  }
}

std::size_t Answer::move_prefix(OutputQueue& queue, const Waiting& first, std::size_t size) {
  const std::size_t moved = std::min(size, kPrefixBytes - prefix_moved_);
  queue.copy(ByteSpan(first.prefix).subspan(prefix_moved_, moved));
  prefix_moved_ += moved;
  return moved;
}

std::size_t Answer::move_piece(OutputQueue& queue, Waiting& first, std::size_t size) {
  Piece& piece = first.message.pieces[piece_];
  const ByteSpan rest = piece.bytes.subspan(piece_moved_);
  const std::size_t moved = std::min(size, rest.size());
  const bool copied = moved <= kCopied;
  if (copied) {
    queue.copy(rest.first(moved));
  } else {
    queue.refer(rest.first(moved));
  }
  piece_moved_ += moved;
  if (moved == rest.size()) {
    if (!copied || moved < piece.bytes.size()) queue.mark({{}, 0, false, std::move(piece.owner)});
    piece.owner.reset();
    ++piece_;
    piece_moved_ = 0;
  }
  return moved;
}

void Answer::next_if_done() {
  if (prefix_moved_ < kPrefixBytes) return;
  Waiting& first = messages_.front();
  while (piece_ < first.message.pieces.size() && first.message.pieces[piece_].bytes.empty()) {
    ++piece_;
  }
  if (piece_ < first.message.pieces.size()) return;
  messages_.pop();
  prefix_moved_ = piece_ = piece_moved_ = 0;
}

void Answer::drop(OutputQueue& queue) {
  if (!messages_.empty() && piece_moved_ > 0) {
    queue.mark({{}, 0, false, std::move(messages_.front().message.pieces[piece_].owner)});
  }
  *this = Answer();
}

}  // namespace attnserve::grpc
