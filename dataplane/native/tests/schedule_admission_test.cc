#include <doctest/doctest.h>

#include <vector>

#include "schedule/admission.h"

using namespace attnserve;
using namespace attnserve::schedule;

namespace {

using Place = AdmissionController::Place;

constexpr auto kMillisecond = std::chrono::milliseconds(1);

bool refused(const std::variant<Place, Status>& entered) {
  return std::holds_alternative<Status>(entered);
}

// Brings `count` requests in whose bodies are complete.
std::vector<Place> receive(AdmissionController& admission, int count, TimePoint now) {
  std::vector<Place> places;
  for (int index = 0; index < count; ++index) {
    auto entered = admission.enter(now, kNever);
    REQUIRE_FALSE(refused(entered));
    places.push_back(std::get<Place>(entered));
    admission.received(places.back());
  }
  return places;
}

// The controller learns that an answer takes `each` of computing. One request stays, so that it
// does not forget.
void learn(AdmissionController& admission, Duration each, TimePoint& now) {
  receive(admission, 1, now);
  for (int round = 0; round < 20; ++round) {
    const auto places = receive(admission, 2, now);
    admission.computed(each * 4);
    for (const Place& place : places) admission.leave(place, true);
    for (const Place& place : receive(admission, 2, now)) admission.leave(place, true);
    now += 60 * kMillisecond;
  }
}

}  // namespace

TEST_CASE("nobody is refused before anything is known") {
  AdmissionController admission(0.5, 4, 1, 1);
  receive(admission, 1000, Clock::now());
  CHECK(admission.inside() == 1000);
}

TEST_CASE("who would wait too long is refused, and told when to come back") {
  AdmissionController admission(0.5, 4, 1, 1);
  TimePoint now = Clock::now();
  learn(admission, 10 * kMillisecond, now);
  receive(admission, 49, now);  // half a second's worth
  const auto entered = admission.enter(now, kNever);
  REQUIRE(refused(entered));
  const auto* surely = std::get_if<Status>(&entered);
  CHECK(surely->code == Code::kResourceExhausted);
  CHECK(surely->message.find("are before this one and would take about") != std::string::npos);
  CHECK(surely->message.find("(--max-queue-ms)") != std::string::npos);
  CHECK(surely->retry_after.count() > 0);
}

TEST_CASE("callers of long contexts wait for a few whatever they take") {
  AdmissionController admission(0.5, 32, 1, 1);
  TimePoint now = Clock::now();
  learn(admission, 1000 * kMillisecond, now);
  receive(admission, 31, now);
  CHECK(refused(admission.enter(now, kNever)));
}

TEST_CASE("a call with a deadline is refused however few are before it, if they take too long") {
  AdmissionController admission(0.5, 32, 1, 1);
  TimePoint now = Clock::now();
  learn(admission, 100 * kMillisecond, now);
  receive(admission, 4, now);
  CHECK_FALSE(refused(admission.enter(now, kNever)));
  CHECK(refused(admission.enter(now, now + 500 * kMillisecond)));
}

TEST_CASE("a burst may wait for half of its deadline, a queue that stands for a tenth") {
  AdmissionController admission(10.0, 4, 1, 1);
  TimePoint now = Clock::now();
  learn(admission, 2 * kMillisecond, now);
  for (const Place& place : receive(admission, 1, now)) admission.leave(place, false);
  const auto admitted = [&] {
    int count = 0;
    while (true) {
      auto entered = admission.enter(now, now + std::chrono::seconds(1));
      if (refused(entered)) return count;
      ++count;
      admission.received(std::get<Place>(entered));
    }
  };
  // `learn` has kept the queue from being empty for over a second.
  CHECK(admitted() <= 51);
  AdmissionController fresh(10.0, 4, 1, 1);
  const auto places = receive(fresh, 5, now);
  fresh.computed(10 * kMillisecond);
  for (int index = 0; index < 4; ++index) fresh.leave(places[index], true);
  int count = 0;
  while (!refused(fresh.enter(now, now + std::chrono::seconds(1)))) ++count;
  CHECK(count > 150);
}

TEST_CASE("what has come is to last for a moment; more is asked for then") {
  AdmissionController admission(0.5, 4, 1, 1);
  TimePoint now = Clock::now();
  CHECK(admission.wants_bodies());
  learn(admission, 4 * kMillisecond, now);
  receive(admission, 1, now);
  CHECK(admission.wants_bodies());
  receive(admission, 4, now);
  CHECK_FALSE(admission.wants_bodies());
}

TEST_CASE("who cannot be answered before its deadline is refused at once") {
  AdmissionController admission(10.0, 4, 1, 1);
  TimePoint now = Clock::now();
  learn(admission, 10 * kMillisecond, now);
  receive(admission, 50, now);
  CHECK_FALSE(refused(admission.enter(now, now + std::chrono::seconds(10))));
  const auto entered = admission.enter(now, now + 200 * kMillisecond);
  REQUIRE(refused(entered));
  CHECK(std::get<Status>(entered).message.find("for its deadline") != std::string::npos);
}

TEST_CASE("an idle server forgets what earlier requests took") {
  AdmissionController admission(0.5, 4, 1, 1);
  TimePoint now = Clock::now();
  for (int round = 0; round < 20; ++round) {
    const auto places = receive(admission, 4, now);
    admission.computed(4 * 1000 * kMillisecond);  // long ones
    for (const Place& place : places) admission.leave(place, true);
    now += std::chrono::seconds(4);
  }
  receive(admission, 100, now);
}

TEST_CASE("calls whose bodies do not come keep nobody out") {
  AdmissionController admission(0.5, 4, 1, 1);
  TimePoint now = Clock::now();
  learn(admission, 10 * kMillisecond, now);
  for (int index = 0; index < 40; ++index) REQUIRE_FALSE(refused(admission.enter(now, kNever)));
  now += std::chrono::seconds(10);
  receive(admission, 40, now);
  CHECK(admission.arriving() == 40);
}

TEST_CASE("time that a caller takes to send is no time of the server's") {
  AdmissionController admission(0.5, 4, 1, 1);
  TimePoint now = Clock::now();
  for (int round = 0; round < 10; ++round) {
    const auto places = receive(admission, 4, now);
    admission.computed(kMillisecond);
    now += std::chrono::seconds(10);  // nobody was busy
    for (const Place& place : places) admission.leave(place, true);
  }
  receive(admission, 64, now);
  CHECK_FALSE(refused(admission.enter(now, kNever)));
}

TEST_CASE("what leaves counts no more, answered or not") {
  AdmissionController admission(0.5, 4, 1, 1);
  const auto places = receive(admission, 2, Clock::now());
  const auto entered = admission.enter(Clock::now(), kNever);
  REQUIRE_FALSE(refused(entered));
  admission.leave(places[0], true);
  admission.leave(places[1], false);
  admission.leave(std::get<Place>(entered), false);
  CHECK(admission.inside() == 0);
  CHECK(admission.arriving() == 0);
}
