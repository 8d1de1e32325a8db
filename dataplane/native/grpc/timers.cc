#include "grpc/timers.h"

#include <algorithm>

namespace attnserve::grpc {

void Timers::schedule(Timed& timed, TimePoint due) {
  if (timed.due_ <= due) return;
  if (timed.index_ == Timed::kAbsent) {
    heap_.push_back(&timed);
    timed.index_ = heap_.size() - 1;
  }
  timed.due_ = due;
  sift_up(&timed, timed.index_);
}

void Timers::remove(Timed& timed) {
  if (timed.index_ == Timed::kAbsent) return;
  const std::size_t index = timed.index_;
  Timed* last = heap_.back();
  heap_.pop_back();
  timed.index_ = Timed::kAbsent;
  timed.due_ = kNever;
  if (last == &timed) return;
  sift_down(last, index);
  sift_up(last, last->index_);
}

Timed* Timers::take_due(TimePoint now) {
  if (next() > now || heap_.empty()) return nullptr;
  Timed* first = heap_.front();
  remove(*first);
  return first;
}

void Timers::put(Timed* timed, std::size_t index) {
  heap_[index] = timed;
  timed->index_ = index;
}

void Timers::sift_up(Timed* timed, std::size_t index) {
  while (index > 0) {
    const std::size_t parent = (index - 1) / 2;
    if (heap_[parent]->due_ <= timed->due_) break;
    put(heap_[parent], index);
    index = parent;
  }
  put(timed, index);
}

void Timers::sift_down(Timed* timed, std::size_t index) {
  for (std::size_t child = 2 * index + 1; child < heap_.size(); child = 2 * index + 1) {
    if (child + 1 < heap_.size() && heap_[child + 1]->due_ < heap_[child]->due_) ++child;
    if (timed->due_ <= heap_[child]->due_) break;
    put(heap_[child], index);
    index = child;
  }
  put(timed, index);
}

}  // namespace attnserve::grpc
