// The jobs that wait, in the order in which they will be served.
//
// By priority first. Within a priority, callers share alike: start-time fair queueing (Goyal, Vin,
// Cheng: "Start-time Fair Queueing", SIGCOMM 1996), where a caller's next request starts, in
// virtual time, when its previous one would have ended. Who sends many waits behind its own
// requests, not others behind it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <tuple>

#include "schedule/job.h"

namespace attnserve::schedule {

struct Entry {
  std::shared_ptr<Job> job;
  TimePoint submitted{};
  double seconds = 0.0;  // that it will take, by estimate; 0: not known
  std::tuple<std::uint32_t, double, std::uint64_t> order{};  // priority, virtual start, number
};

// Needs its owner's lock.
class FairQueue {
 public:
  using Entries = std::map<std::tuple<std::uint32_t, double, std::uint64_t>, Entry>;

  void add(Entry entry);
  bool empty() const { return entries_.empty(); }
  std::size_t size() const { return entries_.size(); }

  // Takes out the first, whose turn it is: virtual time goes on to it.
  Entry serve();
  // Takes one out of turn: who comes later is not set back behind it. Returns the next place.
  Entries::iterator remove(Entries::iterator at, Entry& taken);
  Entries& entries() { return entries_; }
  // What those take together that a newcomer of this priority would wait for.
  double seconds_ahead(std::uint32_t priority) const;

 private:
  void forget_if_empty();

  Entries entries_;
  std::uint64_t number_ = 0;
  double virtual_ = 0.0;
  std::map<std::pair<std::uint64_t, std::uint32_t>, double> ends_;  // by caller and priority
  double seconds_[4] = {};                                          // sums by priority
};

}  // namespace attnserve::schedule
