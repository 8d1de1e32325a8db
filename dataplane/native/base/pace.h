// Whether what a caller sends comes fast enough.
#pragma once

#include <cstddef>
#include <string_view>

#include "base/clock.h"
#include "base/status.h"

namespace attnserve {

struct PaceRule {
  double bytes_per_second = 16.0 * 1024;      // at least so many; 0: as few as it likes
  Duration grace = std::chrono::seconds(10);  // for so long it may be behind; 0: for ever
};

// One sender's. It may fall behind by the grace; bytes that come sooner than they must make up for
// some that come later, but by no more than another grace: however much has come, whoever then
// stops is late two graces after, at the most.
class Pace {
 public:
  explicit Pace(const PaceRule& rule) : rule_(rule) {}

  void begin(TimePoint now);
  void took(std::size_t bytes, TimePoint now);
  // Time in which the sender could not send does not count.
  void forgive(Duration held);
  // When it will be late, unless more comes before; kNever before `begin`, or without a rule.
  TimePoint due() const { return due_; }
  // DEADLINE_EXCEEDED "FIELD: given less than ... bytes a second for longer than ... seconds".
  Status late(std::string_view field) const;

 private:
  PaceRule rule_;
  TimePoint due_ = kNever;
};

}  // namespace attnserve
