#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "schedule_test_support.h"

using namespace attnserve;
using namespace attnserve::schedule;

namespace {

// Runs that take longer than a moment are stopped, and another moment later are wedged.
Rules strict(std::size_t slots = 1) {
  Rules rules;
  rules.slots = slots;
  rules.max_run_seconds = 0.02;
  rules.stop_seconds = 0.02;
  return rules;
}

std::shared_ptr<FakeJob> deaf_job(std::uint64_t kind = 1) {
  auto job = fake_job(kind, true);
  job->deaf = true;
  return job;
}

template <class Condition>
bool soon(Condition condition) {
  const TimePoint until = Clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (Clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace

TEST_CASE("what runs for longer than it may is stopped, and its caller is told why") {
  Rules rules = strict();
  rules.stop_seconds = 20;
  Scheduler scheduler(rules);
  const auto job = fake_job(1, true);
  scheduler.submit(job, false);
  job->wait_ended();
  REQUIRE(job->status());
  CHECK(job->status()->code == Code::kDeadlineExceeded);
  CHECK(job->status()->message ==
        "the computation took longer than 0.02 s and was stopped (--max-run-seconds)");
  CHECK_FALSE(job->was_abandoned);
  CHECK(scheduler.wedged() == 0);
  const auto next = fake_job();
  scheduler.submit(next, false);
  next->wait_ended();
  CHECK(next->outcome());
}

TEST_CASE("one of many that run is found, whenever it began") {
  Rules rules = strict(2);
  rules.stop_seconds = 20;
  Scheduler scheduler(rules);
  for (int index = 0; index < 50; ++index) {
    const auto quick = fake_job();
    scheduler.submit(quick, false);
    quick->wait_ended();
    CHECK(quick->outcome());
  }
  const auto slow = fake_job(2, true);
  scheduler.submit(slow, false);
  slow->wait_ended();
  CHECK(slow->status()->code == Code::kDeadlineExceeded);
}

TEST_CASE("callers of a batch that does not end are told, and what it uses stays until it has") {
  std::atomic<int> changes{0};
  Rules rules = strict();
  rules.wedged_changed = [&changes] { ++changes; };
  std::weak_ptr<FakeJob> kept;
  Scheduler scheduler(rules);
  auto leads = deaf_job(), other = deaf_job(), late = deaf_job();
  std::vector<std::shared_ptr<FakeJob>> jobs{leads, other, late};
  late->request->deadline = Clock::now() + std::chrono::milliseconds(30);
  {
    // So that they wait, and run together.
    const auto before = fake_job(9, true);
    scheduler.submit(before, false);
    before->wait_started();
    for (const auto& job : jobs) {
      job->joinable = true;
      scheduler.submit(job, false);
    }
    before->release();
    before->wait_ended();
  }
  for (const auto& job : jobs) job->wait_ended();
  CHECK(leads->batch() == 3);
  CHECK(leads->status()->code == Code::kUnavailable);
  CHECK(other->status()->code == Code::kUnavailable);
  CHECK(late->status()->code == Code::kDeadlineExceeded);
  for (const auto& job : jobs) CHECK(job->was_abandoned);
  CHECK(soon([&] { return changes == 1; }));
  CHECK(scheduler.wedged() == 1);
  CHECK(scheduler.running() == 1);

  // Its slot is the only one: nothing can run.
  REQUIRE(scheduler.closed());
  CHECK(scheduler.closed()->code == Code::kUnavailable);
  const auto refused = fake_job();
  scheduler.submit(refused, false);
  refused->wait_ended();
  CHECK(refused->status()->code == Code::kUnavailable);

  kept = other;
  other.reset();
  late.reset();
  jobs.clear();
  CHECK_FALSE(kept.expired());
  leads->release();
  CHECK(soon([&] { return kept.expired(); }));
  CHECK(soon([&] { return changes == 2; }));
  CHECK(leads->ends() == 1);
  CHECK(scheduler.wedged() == 0);
  CHECK_FALSE(scheduler.closed());
  const auto next = fake_job();
  scheduler.submit(next, false);
  next->wait_ended();
  CHECK(next->outcome());
}

TEST_CASE("what waits for slots that are all wedged is told, and runs where one is free") {
  Scheduler scheduler(strict(2));
  const auto first = deaf_job(1);
  scheduler.submit(first, false);
  first->wait_ended();
  CHECK(scheduler.wedged() == 1);
  CHECK_FALSE(scheduler.closed());
  const auto runs = fake_job(3);
  scheduler.submit(runs, false);
  runs->wait_ended();
  CHECK(runs->outcome());

  const auto second = deaf_job(2);
  scheduler.submit(second, false);
  second->wait_started();
  const auto waits = fake_job(3);
  scheduler.submit(waits, false);
  waits->wait_ended();
  CHECK(waits->status()->code == Code::kUnavailable);
  CHECK(waits->batch() == 0);
  second->wait_ended();
  first->release();
  second->release();
}

TEST_CASE("without a bound nothing is stopped but what nobody waits for") {
  Scheduler scheduler({.stop_seconds = 0.01});
  const auto job = fake_job(1, true);
  scheduler.submit(job, false);
  job->wait_started();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK_FALSE(job->ended());
  CHECK(scheduler.wedged() == 0);
  job->release();
  job->wait_ended();
  CHECK(job->outcome());
}

TEST_CASE("all that runs can be stopped, and what does not end is told") {
  Scheduler scheduler({.slots = 2});
  CHECK(scheduler.stop_running(Duration::zero()));
  const auto heeds = fake_job(1, true), deaf = deaf_job(2);
  for (const auto& job : {heeds, deaf}) {
    scheduler.submit(job, false);
    job->wait_started();
  }
  CHECK_FALSE(scheduler.stop_running(std::chrono::milliseconds(20)));
  heeds->wait_ended();
  CHECK_FALSE(deaf->ended());
  deaf->release();
  CHECK(scheduler.stop_running(std::chrono::seconds(20)));
}
