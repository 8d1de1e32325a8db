#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <random>
#include <vector>

#include "grpc/timers.h"

using namespace attnserve;
using namespace attnserve::grpc;

namespace {

struct Sleeper : Timed {
  TimePoint due{};
};

TimePoint at(int second) { return TimePoint(std::chrono::seconds(second)); }

}  // namespace

TEST_CASE("timers come in their order, whatever is removed between") {
  std::mt19937 random(7);
  Timers timers;
  std::vector<std::unique_ptr<Sleeper>> sleepers;
  for (int i = 0; i < 500; ++i) {
    sleepers.push_back(std::make_unique<Sleeper>());
    sleepers.back()->due = at(static_cast<int>(random() % 1000));
    timers.schedule(*sleepers.back(), sleepers.back()->due);
  }
  for (std::size_t i = 0; i < 500; i += 3) timers.remove(*sleepers[i]);
  std::vector<TimePoint> expected;
  for (std::size_t i = 0; i < 500; ++i) {
    if (i % 3 != 0) expected.push_back(sleepers[i]->due);
  }
  std::sort(expected.begin(), expected.end());
  for (const TimePoint due : expected) {
    CHECK(timers.next() == due);
    CHECK(timers.take_due(due - std::chrono::nanoseconds(1)) == nullptr);
    auto* taken = static_cast<Sleeper*>(timers.take_due(due));
    REQUIRE(taken != nullptr);
    CHECK(taken->due == due);
  }
  CHECK(timers.next() == kNever);
  CHECK(timers.take_due(kNever) == nullptr);
}

TEST_CASE("a timer is brought forward at once and put off when it comes") {
  Timers timers;
  Sleeper sleeper;
  timers.schedule(sleeper, kNever);
  CHECK(timers.next() == kNever);
  timers.schedule(sleeper, at(10));
  timers.schedule(sleeper, at(5));
  CHECK(timers.next() == at(5));
  timers.schedule(sleeper, at(20));
  CHECK(timers.next() == at(5));
  CHECK(timers.take_due(at(5)) == &sleeper);
  timers.schedule(sleeper, at(20));
  CHECK(timers.next() == at(20));
  timers.remove(sleeper);
  timers.remove(sleeper);
  CHECK(timers.next() == kNever);
}
