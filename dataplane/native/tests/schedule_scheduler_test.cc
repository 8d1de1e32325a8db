#include <doctest/doctest.h>

#include <new>
#include <thread>
#include <vector>

#include "schedule_test_support.h"

using namespace attnserve;
using namespace attnserve::schedule;

namespace {

// The one slot is taken until the job is released.
struct Occupied {
  explicit Occupied(Scheduler& scheduler) : job(fake_job(99, true)) {
    scheduler.submit(job, false);
    job->wait_started();
  }
  ~Occupied() { job->release(); }
  std::shared_ptr<FakeJob> job;
};

void learn_that_it_is_short(Scheduler& scheduler, std::uint64_t kind) {
  for (int index = 0; index < 20; ++index) {
    const auto job = fake_job(kind);
    scheduler.submit(job, false);
    job->wait_ended();
  }
}

// While the machine is busy, what is short takes long.
template <class Attempt>
bool eventually(Attempt attempt) {
  for (int index = 0; index < 100; ++index) {
    if (attempt()) return true;
  }
  return false;
}

}  // namespace

TEST_CASE("a job runs and is told so once") {
  Scheduler scheduler({});
  const auto job = fake_job();
  scheduler.submit(job, false);
  job->wait_ended();
  REQUIRE(job->outcome());
  CHECK(job->outcome()->sequences == 1);
  CHECK(job->outcome()->leads);
  CHECK(job->outcome()->submitted <= job->outcome()->started);
  CHECK(job->outcome()->started <= job->outcome()->ended);
  CHECK(job->ends() == 1);
}

TEST_CASE("those of one key that wait run as one batch, as large as the rules allow") {
  Scheduler scheduler({.max_batch_size = 3});
  std::vector<std::shared_ptr<FakeJob>> jobs;
  {
    const Occupied occupied(scheduler);
    for (int index = 0; index < 4; ++index) {
      jobs.push_back(fake_job(7));
      jobs.back()->joinable = true;
      scheduler.submit(jobs.back(), false);
    }
    jobs.push_back(fake_job(8));
    jobs.back()->joinable = true;
    scheduler.submit(jobs.back(), false);
    CHECK(scheduler.waiting() == 5);
  }
  for (const auto& job : jobs) job->wait_ended();
  CHECK(jobs[0]->batch() == 3);
  CHECK(jobs[0]->outcome()->sequences == 3);
  CHECK(jobs[0]->outcome()->leads);
  CHECK_FALSE(jobs[1]->outcome()->leads);
  CHECK(jobs[3]->outcome()->sequences == 1);
  CHECK(jobs[4]->outcome()->sequences == 1);
}

TEST_CASE("jobs that may not be joined run alone") {
  Scheduler scheduler({});
  std::vector<std::shared_ptr<FakeJob>> jobs;
  {
    const Occupied occupied(scheduler);
    for (int index = 0; index < 2; ++index) {
      jobs.push_back(fake_job(7));
      scheduler.submit(jobs.back(), false);
    }
  }
  for (const auto& job : jobs) job->wait_ended();
  CHECK(jobs[0]->outcome()->sequences == 1);
  CHECK(jobs[1]->outcome()->sequences == 1);
}

TEST_CASE("where a batch fails, each of it runs alone, and only the one at fault fails") {
  Scheduler scheduler({});
  std::vector<std::shared_ptr<FakeJob>> jobs;
  {
    const Occupied occupied(scheduler);
    for (int index = 0; index < 3; ++index) {
      jobs.push_back(fake_job(7));
      jobs.back()->joinable = true;
    }
    jobs[0]->fails = true;  // it leads, so that the whole batch fails at first
    for (const auto& job : jobs) scheduler.submit(job, false);
  }
  for (const auto& job : jobs) job->wait_ended();
  REQUIRE(jobs[0]->status());
  CHECK(jobs[0]->status()->code == Code::kInternal);
  CHECK(jobs[1]->outcome());
  CHECK(jobs[2]->outcome());
}

TEST_CASE("one more than may wait is refused at once") {
  Scheduler scheduler({.max_queue = 1, .max_queue_seconds = 10});
  const Occupied occupied(scheduler);
  const auto waits = fake_job();
  scheduler.submit(waits, false);
  const auto refused = fake_job();
  scheduler.submit(refused, false);
  REQUIRE(refused->status());
  CHECK(refused->status()->code == Code::kResourceExhausted);
  CHECK(refused->status()->message == "queue: 1 requests are waiting; allowed: 1");
  CHECK(refused->status()->retry_after.count() > 0);
  CHECK_FALSE(waits->ended());
}

TEST_CASE("a job whose deadline passes while it waits fails then, not when a slot is free") {
  Scheduler scheduler({});
  const Occupied occupied(scheduler);
  const auto job = fake_job();
  job->request->deadline = Clock::now() + std::chrono::milliseconds(20);
  scheduler.submit(job, false);
  job->wait_ended();
  REQUIRE(job->status());
  CHECK(job->status()->code == Code::kDeadlineExceeded);
  CHECK(job->status()->message == "the deadline passed before the computation could start");
}

TEST_CASE("a cancelled job leaves the queue at once and never runs") {
  Scheduler scheduler({});
  const Occupied occupied(scheduler);
  const auto job = fake_job();
  scheduler.submit(job, false);
  scheduler.cancel(job->request);
  REQUIRE(job->status());
  CHECK(job->status()->code == Code::kCancelled);
  CHECK(scheduler.waiting() == 0);
  CHECK(job->batch() == 0);
}

TEST_CASE("what runs for nobody any more is stopped: by cancellation, by its deadline") {
  Scheduler scheduler({});
  const auto cancelled = fake_job(1, true);
  scheduler.submit(cancelled, false);
  cancelled->wait_started();
  while (!cancelled->ended()) {  // until the run has its stop
    scheduler.cancel(cancelled->request);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  REQUIRE(cancelled->status());
  CHECK(cancelled->status()->code == Code::kCancelled);

  const auto late = fake_job(2, true);
  late->request->deadline = Clock::now() + std::chrono::milliseconds(20);
  scheduler.submit(late, false);
  late->wait_ended();
  REQUIRE(late->status());
  CHECK(late->status()->code == Code::kDeadlineExceeded);
  CHECK(late->status()->message == "the deadline passed before the computation ended");
}

TEST_CASE("what its caller gave up while it waited for others to join is stopped") {
  Scheduler scheduler({.batch_delay = 0.1});
  const auto job = fake_job(1, true);
  job->joinable = true;
  scheduler.submit(job, false);
  while (scheduler.running() == 0) std::this_thread::yield();
  scheduler.cancel(job->request);
  job->wait_ended();
  REQUIRE(job->status());
  CHECK(job->status()->code == Code::kCancelled);
  CHECK(job->status()->message == "the caller cancelled the request");
}

TEST_CASE("a job for which no stop can be made runs to its end, and so does the next") {
  struct Unstoppable final : FakeJob {
    std::unique_ptr<engine::Stop> make_stop() override { throw std::bad_alloc(); }
  };
  Scheduler scheduler({});
  const auto job = std::make_shared<Unstoppable>();
  scheduler.submit(job, false);
  job->wait_ended();
  CHECK(job->outcome());
  const auto next = fake_job(2);
  scheduler.submit(next, false);
  next->wait_ended();
  CHECK(next->outcome());
}

TEST_CASE("high priority goes first, and callers take turns") {
  Scheduler scheduler({.max_queue = 100, .max_queue_seconds = 10});
  std::vector<std::shared_ptr<FakeJob>> many;
  const auto other = fake_job(5), high = fake_job(6);
  {
    const Occupied occupied(scheduler);
    for (int index = 0; index < 4; ++index) {
      many.push_back(fake_job(4));
      many.back()->request->caller = 1;
      scheduler.submit(many.back(), false);
    }
    other->request->caller = 2;
    scheduler.submit(other, false);
    high->request->caller = 1;
    high->request->priority = kHigh;
    scheduler.submit(high, false);
  }
  for (const auto& job : many) job->wait_ended();
  other->wait_ended();
  high->wait_ended();
  CHECK(high->outcome()->started <= many[0]->outcome()->started);
  CHECK(other->outcome()->started <= many[1]->outcome()->started);
}

TEST_CASE("once a kind is known to be short it runs on the thread that brought it") {
  Scheduler scheduler({});
  CHECK(eventually([&] {
    learn_that_it_is_short(scheduler, 3);
    const auto job = fake_job(3);
    scheduler.submit(job, true);
    // On a busy machine it may not have looked short, and ran elsewhere: then once more.
    if (job->ended()) return false;
    scheduler.run_short();
    return job->ended();
  }));
}

TEST_CASE("what is tiny overtakes a long computation") {
  Scheduler scheduler({});
  CHECK(eventually([&] {
    learn_that_it_is_short(scheduler, 3);
    const Occupied occupied(scheduler);
    const auto job = fake_job(3);
    scheduler.submit(job, true);
    scheduler.run_short();
    return job->ended();
  }));
}

TEST_CASE("what is tiny is not refused for what it does not wait for") {
  Scheduler scheduler({.max_queue_seconds = 0.001, .patience = 0});
  CHECK(eventually([&] {
    learn_that_it_is_short(scheduler, 3);
    const auto first = fake_job(9, true);
    scheduler.submit(first, false);
    first->wait_started();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    first->release();
    first->wait_ended();
    const auto second = fake_job(9, true);  // about as long
    scheduler.submit(second, false);
    second->wait_started();
    const auto other = fake_job(9);
    scheduler.submit(other, true);
    const auto tiny = fake_job(3);
    scheduler.submit(tiny, true);
    scheduler.run_short();
    const bool right = other->status() && tiny->ended() && !tiny->status();
    second->release();
    second->wait_ended();
    return right;
  }));
}

TEST_CASE("a draining scheduler refuses new jobs and runs those it has") {
  Scheduler scheduler({});
  std::shared_ptr<FakeJob> waits = fake_job();
  {
    const Occupied occupied(scheduler);
    scheduler.submit(waits, false);
    scheduler.drain();
    const auto refused = fake_job();
    scheduler.submit(refused, false);
    REQUIRE(refused->status());
    CHECK(refused->status()->code == Code::kUnavailable);
  }
  waits->wait_ended();
  CHECK(waits->outcome());
}

TEST_CASE("two that do not fit into memory together run one after another") {
  Scheduler scheduler({.slots = 2, .max_working_bytes = 100});
  const auto first = fake_job(1, true);
  first->working_bytes = 60;
  scheduler.submit(first, false);
  first->wait_started();
  const auto second = fake_job(2);
  second->working_bytes = 60;
  scheduler.submit(second, false);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK_FALSE(second->ended());
  first->release();
  second->wait_ended();
  CHECK(second->outcome());
}

TEST_CASE("a scheduler that ends tells every job") {
  std::vector<std::shared_ptr<FakeJob>> jobs;
  {
    Scheduler scheduler({});
    jobs.push_back(fake_job(1, true));
    scheduler.submit(jobs.back(), false);
    jobs.back()->wait_started();
    for (int index = 0; index < 3; ++index) {
      jobs.push_back(fake_job(2));
      scheduler.submit(jobs.back(), false);
    }
    jobs.front()->release();
  }
  for (const auto& job : jobs) CHECK(job->ends() == 1);
}

TEST_CASE("many threads submit, cancel and run at once: each job ends exactly once") {
  std::vector<std::shared_ptr<FakeJob>> jobs;
  for (int index = 0; index < 800; ++index) {
    jobs.push_back(fake_job(static_cast<std::uint64_t>(index % 3)));
    jobs.back()->joinable = index % 2 == 0;
    jobs.back()->request->caller = static_cast<std::uint64_t>(index % 5);
    if (index % 7 == 0)
      jobs.back()->request->deadline = Clock::now() + std::chrono::milliseconds(5);
  }
  {
    Scheduler scheduler({.slots = 2, .max_queue = 1000, .max_queue_seconds = 60});
    std::vector<std::thread> threads;
    for (std::size_t thread = 0; thread < 4; ++thread) {
      threads.emplace_back([&, thread] {
        for (std::size_t index = thread; index < jobs.size(); index += 4) {
          scheduler.submit(jobs[index], index % 2 == 0);
          if (index % 5 == 0) scheduler.cancel(jobs[index]->request);
          if (index % 2 == 0) scheduler.run_short();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  for (const auto& job : jobs) CHECK(job->ends() == 1);
}

TEST_CASE("what a job takes is told by its units, whatever ran with it") {
  Scheduler scheduler({.max_queue_seconds = 1e-3, .patience = 0});
  const auto learned = fake_job(5, true);
  learned->units = 10;
  scheduler.submit(learned, false);
  learned->wait_started();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  learned->release();
  learned->wait_ended();
  const Occupied occupied(scheduler);
  const auto long_one = fake_job(5), behind = fake_job(6);
  long_one->units = 1000;
  scheduler.submit(long_one, false);
  scheduler.submit(behind, false);
  // Behind 5 seconds of others nobody may wait.
  REQUIRE(behind->ended());
  CHECK(behind->status()->code == Code::kResourceExhausted);
  CHECK(behind->status()->retry_after > std::chrono::seconds(3));
}
