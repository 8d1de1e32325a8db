// A global that is never destroyed, because threads that outlast main may still use it.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

namespace attnserve {

template <class T>
class NeverDestroyed {
 public:
  template <class... Arguments>
  explicit NeverDestroyed(Arguments&&... arguments)
      : value_(std::construct_at(reinterpret_cast<T*>(room_),
                                 std::forward<Arguments>(arguments)...)) {}
  NeverDestroyed(const NeverDestroyed&) = delete;
  NeverDestroyed& operator=(const NeverDestroyed&) = delete;

  T& operator*() { return *value_; }
  T* operator->() { return value_; }

 private:
  alignas(T) std::byte room_[sizeof(T)];
  T* value_;
};

}  // namespace attnserve
