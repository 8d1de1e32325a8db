#include "grpc/output_queue.h"

#include <algorithm>
#include <cstring>

namespace attnserve::grpc {

namespace {

// Holds the frame headers of several answers; small, for each of many connections may keep one.
constexpr std::size_t kBlockBytes = 1024;

}  // namespace

void OutputQueue::copy(ByteSpan bytes) {
  std::byte* place = room(bytes.size());
  std::memcpy(place, bytes.data(), bytes.size());
  append(place, bytes.size());
  blocks_.back().end = appended_;
}

void OutputQueue::refer(ByteSpan bytes) { append(bytes.data(), bytes.size()); }

void OutputQueue::append(const std::byte* data, std::size_t size) {
  if (size == 0) return;
  appended_ += size;
  if (!parts_.empty()) {
    iovec& last = parts_.back();
    if (static_cast<std::byte*>(last.iov_base) + last.iov_len == data) {
      last.iov_len += size;
      return;
    }
  }
  // iovec is for reading too, hence not const; nobody writes through it.
  parts_.push({const_cast<std::byte*>(data), size});
}

void OutputQueue::mark(Mark mark) { marks_.push({appended_, std::move(mark)}); }

std::size_t OutputQueue::fill(std::span<iovec> into) const {
  const std::size_t count = std::min(into.size(), parts());
  std::copy_n(parts_.items().begin(), count, into.begin());
  return count;
}

void OutputQueue::written(std::size_t size) {
  written_ += size;
  while (size > 0) {
    iovec& part = parts_.front();
    const std::size_t taken = std::min(size, part.iov_len);
    part.iov_base = static_cast<std::byte*>(part.iov_base) + taken;
    part.iov_len -= taken;
    size -= taken;
    if (part.iov_len == 0) parts_.pop();
  }
  free_blocks();
}

bool OutputQueue::reached(Mark& mark) {
  if (marks_.empty() || marks_.front().position > written_) return false;
  mark = marks_.pop().mark;
  return true;
}

std::byte* OutputQueue::room(std::size_t size) {
  if (blocks_.empty() || blocks_.back().capacity - blocks_.back().used < size) {
    const std::size_t capacity = std::max(kBlockBytes, size);
    blocks_.push_back({std::make_unique_for_overwrite<std::byte[]>(capacity), capacity, 0, 0});
  }
  Block& block = blocks_.back();
  std::byte* place = block.memory.get() + block.used;
  block.used += size;
  return place;
}

// Blocks end in order. The last is kept for what comes next, unless it was made for one long frame.
void OutputQueue::free_blocks() {
  const auto busy = std::find_if(blocks_.begin(), blocks_.end(),
                                 [this](const Block& block) { return block.end > written_; });
  if (busy != blocks_.end()) {
    blocks_.erase(blocks_.begin(), busy);
    return;
  }
  if (blocks_.empty()) return;
  blocks_.erase(blocks_.begin(), blocks_.end() - 1);
  if (blocks_.back().capacity > kBlockBytes) {
    blocks_.clear();
  } else {
    blocks_.back().used = 0;
  }
}

}  // namespace attnserve::grpc
