// A queue in one piece of memory, which an empty one reuses.
#pragma once

#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace attnserve::grpc {

// Costs nothing while empty (std::deque allocates at once) and nothing per item once warm.
template <class T>
class Fifo {
 public:
  bool empty() const { return first_ == items_.size(); }
  std::span<const T> items() const { return std::span(items_).subspan(first_); }
  T& front() { return items_[first_]; }
  T& back() { return items_.back(); }
  void push(T item) { items_.push_back(std::move(item)); }

  T pop() {
    T item = std::move(items_[first_++]);
    if (empty()) {
      items_.clear();
    } else if (first_ >= kManyTaken && first_ > items_.size() / 2) {
      items_.erase(items_.begin(), items_.begin() + static_cast<std::ptrdiff_t>(first_));
    } else {
      return item;
    }
    first_ = 0;
    return item;
  }

 private:
  static constexpr std::size_t kManyTaken = 64;

  std::vector<T> items_;  // from first_ on; what is before has been moved out
  std::size_t first_ = 0;
};

}  // namespace attnserve::grpc
