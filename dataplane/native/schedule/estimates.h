// How long jobs take, learned from those that ran.
#pragma once

#include <cstdint>
#include <list>
#include <unordered_map>

#include "engine/attend.h"

namespace attnserve::schedule {

struct BatchKeyHash {
  std::size_t operator()(const engine::BatchKey& key) const noexcept {
    std::uint64_t mixed = 0xcbf29ce484222325ULL;
    for (const std::uint64_t part : key) mixed = (mixed ^ part) * 0x9e3779b97f4a7c15ULL;
    return static_cast<std::size_t>(mixed ^ (mixed >> 32));
  }
};

// Running means of the seconds that one unit of each kind takes: a sequence, unless the job says
// otherwise. Needs its owner's lock.
class Estimates {
 public:
  // What so many units of a kind will take; 0 for a kind never seen.
  double seconds(const engine::BatchKey& key, std::int64_t units) const;
  void observe(const engine::BatchKey& key, std::int64_t units, double seconds);

 private:
  struct Entry {
    double mean;
    std::list<engine::BatchKey>::iterator place;
  };
  std::unordered_map<engine::BatchKey, Entry, BatchKeyHash> means_;
  std::list<engine::BatchKey> by_use_;  // the longest unseen first
};

}  // namespace attnserve::schedule
