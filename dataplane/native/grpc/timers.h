// Who wants to be called when: a heap in which everybody is at most once, so that ten thousand idle
// connections cost nothing while nothing is due.
#pragma once

#include <cstddef>
#include <vector>

#include "base/clock.h"

namespace attnserve::grpc {

// What can stand in the heap; not copied or moved meanwhile.
class Timed {
 public:
  Timed() = default;
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 protected:
  ~Timed() = default;

 private:
  friend class Timers;
  static constexpr std::size_t kAbsent = static_cast<std::size_t>(-1);
  TimePoint due_ = kNever;
  std::size_t index_ = kAbsent;
};

// Used by one thread. Whoever is in it is removed before it is destroyed.
class Timers {
 public:
  // So that scheduling fewer never fails.
  void reserve(std::size_t count) {
    if (heap_.capacity() < count) heap_.reserve(2 * count);
  }
  // Nobody is called before `due`. Putting a timer off does not move it: it comes at the time it
  // was first set for and is set again then, which is cheaper for times that move on all the while.
  void schedule(Timed& timed, TimePoint due);
  void remove(Timed& timed);
  TimePoint next() const { return heap_.empty() ? kNever : heap_.front()->due_; }
  // Takes out the first that is due; nullptr: none is.
  Timed* take_due(TimePoint now);

 private:
  void put(Timed* timed, std::size_t index);
  void sift_up(Timed* timed, std::size_t index);
  void sift_down(Timed* timed, std::size_t index);

  std::vector<Timed*> heap_;  // heap_[i] is due no later than heap_[2i+1] and heap_[2i+2]
};

}  // namespace attnserve::grpc
