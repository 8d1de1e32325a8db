// How many connections there are, and how many there may be, in all and of one caller's address.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "base/clock.h"

namespace attnserve::grpc {

class Places;

// One connection's, given back on destruction. An empty one is nobody's.
class Place {
 public:
  Place() = default;
  Place(Place&& other) noexcept
      : places_(std::exchange(other.places_, nullptr)), host_(std::move(other.host_)) {}
  Place& operator=(Place&& other) noexcept {
    std::swap(places_, other.places_);
    std::swap(host_, other.host_);
    return *this;
  }
  ~Place();

 private:
  friend class Places;
  Place(Places& places, std::string host) : places_(&places), host_(std::move(host)) {}

  Places* places_ = nullptr;
  std::string host_;
};

// Any thread. Outlives every Place.
class Places {
 public:
  // 0: no bound.
  Places(std::size_t most, std::size_t most_per_host)
      : most_(most), most_per_host_(most_per_host) {}

  std::optional<Place> take(std::string host);  // nothing: there are too many
  std::size_t taken() const;
  bool wait_until_none(TimePoint end) const;  // false: some were left at `end`

 private:
  friend class Place;
  void give_back(const std::string& host) noexcept;

  const std::size_t most_;
  const std::size_t most_per_host_;
  mutable std::mutex mutex_;  // guards the two below
  mutable std::condition_variable none_left_;
  std::size_t taken_ = 0;
  std::map<std::string, std::size_t> taken_of_host_;
};

}  // namespace attnserve::grpc
