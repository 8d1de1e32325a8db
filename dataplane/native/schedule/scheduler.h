// Slots to run in, and who runs together.
//
// A job that is short runs on the thread that brought it, once that thread has read all that came:
// nothing is handed over and nothing waits. Longer ones run on threads of the scheduler. While all
// slots are taken, jobs gather in the queue; whoever gets the next slot takes along those of its
// key and runs them as one batch. So batches grow with the load, and an idle server delays nobody.
//
// A run that takes too long is stopped. One that does not end then is wedged: its callers are told,
// and while any is, the process had better be replaced.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "schedule/estimates.h"
#include "schedule/fair_queue.h"
#include "schedule/job.h"

namespace attnserve::schedule {

struct Rules {
  std::size_t slots = 1;                   // batches that run at once
  std::size_t max_queue = 256;             // jobs that may wait; one more is refused
  double max_queue_seconds = 0.5;          // one that would wait longer, by estimate, is refused,
  double patience = 32;                    // unless it waits no longer than for so many like itself
  std::int64_t max_batch_size = 64;        // sequences that run together
  std::size_t max_batch_bytes = 2U << 20;  // tensors of jobs that run together
  std::size_t max_working_bytes = SIZE_MAX;  // estimated memory of all that runs
  double batch_delay = 0.0;                  // seconds that a batch waits for more to join
  double max_run_seconds = 0.0;              // what runs longer is stopped; 0: nothing is
  double stop_seconds = 10.0;                // what has not ended so long after that is wedged
  // Called, without a lock held, when a run is found wedged and when one has ended after all.
  std::function<void()> wedged_changed = {};
};

// What a draining server refuses with.
Status shutting_down();
// A time so many seconds later.
TimePoint after(TimePoint from, double seconds);

// Any thread may call everything. Jobs are told of their end without any lock held.
class Scheduler {
 public:
  explicit Scheduler(Rules rules);
  ~Scheduler();  // fails what waits, stops what runs, joins its threads: when all has ended

  // Refuses a request that has not been read yet, if it would be refused later anyway.
  std::optional<Status> check_room(const RequestContext& request);
  // Takes a job. Refused ones fail at once, on this thread. `runs_here`: the caller will call
  // run_short on this thread very soon.
  void submit(std::shared_ptr<Job> job, bool runs_here);
  // Runs, on this thread, what can run at once and is short; sees to it that others run the rest.
  void run_short();
  // Nobody waits for this request any more: its jobs leave the queue, and a batch that runs for
  // nobody else is stopped.
  void cancel(const std::shared_ptr<RequestContext>& request);
  // Refuses new jobs; those that wait still run.
  void drain();
  bool draining() const;
  // Why nothing can be taken: it drains, or whatever could run it is wedged.
  std::optional<Status> closed() const;
  // Stops what runs. False: some of it has not ended in time.
  bool stop_running(Duration timeout);
  std::size_t waiting() const;
  std::size_t running() const;
  std::size_t wedged() const;  // those of them that do not end

 private:
  // A batch that runs.
  struct Running {
    std::vector<Entry> batch;
    TimePoint since{};
    double seconds = 0.0;
    std::size_t working_bytes = 0;
    bool holds_slot = true;
    std::unique_ptr<engine::Stop> stop;
    TimePoint started{};
    TimePoint due = kNever;  // when it has run for as long as it may
    bool overdue = false;    // then it was stopped,
    bool wedged = false;     // and did not end: its callers were told
  };

  std::optional<Status> refusal(const RequestContext& request, std::optional<double> seconds,
                                TimePoint now) const;
  bool fits(const Entry& entry) const;
  static bool is_tiny(double seconds);
  double ahead(std::uint32_t priority, TimePoint now) const;
  std::shared_ptr<Running> take(bool tiny,
                                std::vector<std::pair<std::shared_ptr<Job>, Status>>& dead);
  void gather(Running& running, std::unique_lock<std::mutex>& lock);
  void execute(std::shared_ptr<Running> running);
  void begin(Running& running, std::unique_ptr<engine::Stop> stop);
  void tell(const Running& running, std::span<const std::exception_ptr> errors, TimePoint ended);
  void work();
  void watch();
  void look_at(Running& running, TimePoint now);
  void abandon(const Running& running) const;
  void has_ended(const Running& running) const;
  Status too_long() const;
  std::optional<Status> closed_locked() const;
  static bool wanted(const Running& running, TimePoint now);  // by any of its callers
  static std::optional<Status> lost_interest(const RequestContext& request, TimePoint now,
                                             const char* when);

  const Rules rules_;
  mutable std::mutex mutex_;           // guards all below
  std::condition_variable slot_free_;  // a thread of ours may have something to run
  std::condition_variable joined_;     // a job has come, for batches that wait for more
  std::condition_variable sooner_;     // the next deadline has come nearer
  std::condition_variable ended_;      // nothing runs any more
  FairQueue queue_;
  Estimates estimates_;
  std::vector<std::shared_ptr<Running>> running_;
  std::size_t free_slots_;
  std::size_t idle_threads_ = 0;
  std::size_t wedged_ = 0, wedged_slots_ = 0;
  std::size_t working_bytes_ = 0;
  bool draining_ = false;
  bool stopping_ = false;
  TimePoint next_look_ = kNever;  // when the watcher will look at deadlines
  std::vector<std::thread> threads_;
  std::thread watcher_;
};

}  // namespace attnserve::schedule
