#include "schedule/scheduler.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/text.h"

namespace attnserve::schedule {
namespace {

// Jobs up to here run on the thread that brought them without asking for a slot: handing them over
// would take about as long, and behind one long computation they would wait for nothing.
constexpr double kTinySeconds = 0.3e-3;
// Jobs up to here run there too, if a slot is free. Beyond it, a connection's thread has others to
// serve.
constexpr double kShortSeconds = 2e-3;
// What a whole batch may take on the thread of a connection, and after how long that thread leaves
// what is still in the queue to others and reads on.
constexpr double kLongestHere = 4e-3;

std::string milliseconds(double seconds) { return std::to_string(std::llround(seconds * 1e3)); }

std::chrono::microseconds retry_after(double seconds) {
  return std::chrono::microseconds(std::llround(std::max(seconds, 0.001) * 1e6));
}

// nullptr: there is no memory for one, and the job runs to its end.
std::unique_ptr<engine::Stop> stop_for(Job& job) {
  try {
    return job.make_stop();
  } catch (...) {
    return nullptr;
  }
}

}  // namespace

Status shutting_down() {
  return {Code::kUnavailable, "the server is shutting down; try another one", {}};
}

TimePoint after(TimePoint from, double seconds) {
  return from + std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

Scheduler::Scheduler(Rules rules) : rules_(rules), free_slots_(rules.slots) {
  for (std::size_t slot = 0; slot < rules_.slots; ++slot) {
    threads_.emplace_back([this] { work(); });
    pthread_setname_np(threads_.back().native_handle(), "compute");
  }
  watcher_ = std::thread([this] { watch(); });
  pthread_setname_np(watcher_.native_handle(), "deadlines");
}

Scheduler::~Scheduler() {
  std::vector<Entry> waiting;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = draining_ = true;
    while (!queue_.empty()) waiting.push_back(queue_.serve());
    for (const auto& running : running_) {
      if (running->stop) running->stop->request();
    }
  }
  slot_free_.notify_all();
  joined_.notify_all();
  sooner_.notify_all();
  for (Entry& entry : waiting) entry.job->failed(shutting_down());
  for (std::thread& thread : threads_) thread.join();
  watcher_.join();
}

std::optional<Status> Scheduler::check_room(const RequestContext& request) {
  const std::lock_guard lock(mutex_);
  return refusal(request, std::nullopt, Clock::now());
}

void Scheduler::submit(std::shared_ptr<Job> job, bool runs_here) {
  const TimePoint now = Clock::now();
  std::optional<Status> refused = lost_interest(*job->request, now, "could start");
  if (const auto& recording = job->request->recording) {
    recording->mark_first(tracing::Mark::kChecked, now);
  }
  bool wake = false;
  bool look = false;
  if (!refused) {
    const std::lock_guard lock(mutex_);
    const double seconds = estimates_.seconds(job->key, job->measure());
    // What runs at once on the thread that brought it waits for no slot.
    const bool at_once = runs_here && rules_.batch_delay <= 0 && is_tiny(seconds);
    refused = refusal(*job->request, at_once ? std::nullopt : std::optional(seconds), now);
    if (!refused) {
      const TimePoint deadline = job->request->deadline;
      queue_.add(Entry{job, now, seconds, {}});
      wake = !runs_here && free_slots_ > 0 && idle_threads_ > 0;
      if (deadline < next_look_) {
        next_look_ = deadline;
        look = true;
      }
    }
  }
  if (refused) {
    job->failed(std::move(*refused));
    return;
  }
  if (wake) slot_free_.notify_one();
  if (look) sooner_.notify_one();
  if (rules_.batch_delay > 0) joined_.notify_all();
}

void Scheduler::run_short() {
  const TimePoint until = after(Clock::now(), kLongestHere);
  while (true) {
    std::vector<std::pair<std::shared_ptr<Job>, Status>> dead;
    std::shared_ptr<Running> running;
    bool wake = false;
    {
      std::unique_lock lock(mutex_);
      if (queue_.empty()) return;
      if (rules_.batch_delay <= 0 && Clock::now() < until) running = take(true, dead);
      if (running) gather(*running, lock);
      wake = !queue_.empty() && free_slots_ > 0 && idle_threads_ > 0;
    }
    if (wake) slot_free_.notify_one();
    for (auto& [job, status] : dead) job->failed(std::move(status));
    if (!running) return;
    execute(std::move(running));
  }
}

void Scheduler::cancel(const std::shared_ptr<RequestContext>& request) {
  request->cancelled = true;
  std::vector<Entry> gone;
  {
    const std::lock_guard lock(mutex_);
    auto& entries = queue_.entries();
    for (auto at = entries.begin(); at != entries.end();) {
      if (at->second.job->request != request) {
        ++at;
        continue;
      }
      Entry taken;
      at = queue_.remove(at, taken);
      gone.push_back(std::move(taken));
    }
    const TimePoint now = Clock::now();
    for (const auto& running : running_) {
      if (running->stop && !wanted(*running, now)) running->stop->request();
    }
  }
  for (Entry& entry : gone) {
    entry.job->failed({Code::kCancelled, "the caller cancelled the request", {}});
  }
  // The first in the queue may have been too large to start beside what runs.
  slot_free_.notify_one();
}

void Scheduler::drain() {
  const std::lock_guard lock(mutex_);
  draining_ = true;
}

bool Scheduler::draining() const {
  const std::lock_guard lock(mutex_);
  return draining_;
}

std::optional<Status> Scheduler::closed() const {
  const std::lock_guard lock(mutex_);
  return closed_locked();
}

bool Scheduler::stop_running(Duration timeout) {
  std::unique_lock lock(mutex_);
  for (const auto& running : running_) {
    if (running->stop) running->stop->request();
  }
  return ended_.wait_for(lock, timeout, [this] { return running_.empty(); });
}

std::size_t Scheduler::waiting() const {
  const std::lock_guard lock(mutex_);
  return queue_.size();
}

std::size_t Scheduler::running() const {
  const std::lock_guard lock(mutex_);
  return running_.size();
}

std::size_t Scheduler::wedged() const {
  const std::lock_guard lock(mutex_);
  return wedged_;
}

std::optional<Status> Scheduler::refusal(const RequestContext& request,
                                         std::optional<double> seconds, TimePoint now) const {
  if (auto closed = closed_locked()) return closed;
  if (queue_.empty() && free_slots_ > 0) return std::nullopt;
  const double wait = ahead(request.priority, now);
  const std::size_t waiting = queue_.size();
  if (waiting >= rules_.max_queue) {
    return Status{Code::kResourceExhausted,
                  text("queue: ", waiting, " requests are waiting; allowed: ", rules_.max_queue),
                  retry_after(wait / 2)};
  }
  if (!seconds) return std::nullopt;
  double allowed = std::max(rules_.max_queue_seconds, rules_.patience * *seconds);
  const char* why = "(--max-queue-ms)";
  if (request.deadline != kNever) {
    const double left = attnserve::seconds(request.deadline - now) - *seconds;
    if (left < allowed) {
      allowed = std::max(0.0, left);
      why = "until the deadline";
    }
  }
  if (wait <= allowed) return std::nullopt;
  return Status{Code::kResourceExhausted,
                text("queue: the wait would be about ", milliseconds(wait),
                     " ms; allowed: ", milliseconds(allowed), " ms ", why),
                retry_after(wait - allowed)};
}

double Scheduler::ahead(std::uint32_t priority, TimePoint now) const {
  double running = 0.0;
  for (const auto& each : running_) {
    running += std::max(0.0, each->seconds - attnserve::seconds(now - each->since));
  }
  return (running + queue_.seconds_ahead(priority)) / static_cast<double>(rules_.slots);
}

// Whether there is memory for an entry beside what runs.
bool Scheduler::fits(const Entry& entry) const {
  return running_.empty() || entry.job->working_bytes + working_bytes_ <= rules_.max_working_bytes;
}

bool Scheduler::is_tiny(double seconds) { return seconds > 0 && seconds <= kTinySeconds; }

// The next batch's leader, with its slot; nullptr if there is none. `here`: on a connection's
// thread, which runs short ones alone. Those for whom nobody waits any more go to `dead`. The lock
// is held.
std::shared_ptr<Scheduler::Running> Scheduler::take(
    bool here, std::vector<std::pair<std::shared_ptr<Job>, Status>>& dead) {
  const TimePoint now = Clock::now();
  auto& entries = queue_.entries();
  for (auto at = entries.begin(); at != entries.end();) {
    const Entry& entry = at->second;
    if (auto lost = lost_interest(*entry.job->request, now, "could start")) {
      Entry taken;
      at = queue_.remove(at, taken);
      dead.emplace_back(std::move(taken.job), std::move(*lost));
      continue;
    }
    const bool first = at == entries.begin();
    const bool tiny = here && is_tiny(entry.seconds);
    const bool slot = free_slots_ > 0 && first &&
                      (!here || (entry.seconds > 0 && entry.seconds <= kShortSeconds));
    if ((!tiny && !slot) || !fits(entry)) {
      // Nobody overtakes the first but what is tiny.
      if (!here) return nullptr;
      ++at;
      continue;
    }
    auto running = std::make_shared<Running>();
    running->since = now;
    running->holds_slot = slot;
    if (slot) --free_slots_;
    Entry taken;
    if (first) {
      taken = queue_.serve();
    } else {
      queue_.remove(at, taken);
    }
    working_bytes_ += taken.job->working_bytes;
    running->working_bytes = taken.job->working_bytes;
    running->seconds = taken.seconds;
    running->batch.push_back(std::move(taken));
    running_.push_back(running);
    return running;
  }
  return nullptr;
}

// Adds those in the queue that may run with the leader. The lock is held, but for the wait.
void Scheduler::gather(Running& running, std::unique_lock<std::mutex>& lock) {
  const Job& leader = *running.batch.front().job;
  if (!leader.joinable || rules_.max_batch_size <= 1) return;
  std::int64_t sequences = leader.sequences;
  std::size_t tensor_bytes = leader.tensor_bytes;
  const TimePoint until = after(running.batch.front().submitted, rules_.batch_delay);
  while (true) {
    auto& entries = queue_.entries();
    for (auto at = entries.begin(); at != entries.end();) {
      const Job& more = *at->second.job;
      if (more.key != leader.key || !more.joinable || more.request->cancelled) {
        ++at;
        continue;
      }
      if (sequences + more.sequences > rules_.max_batch_size ||
          tensor_bytes + more.tensor_bytes > rules_.max_batch_bytes ||
          working_bytes_ + more.working_bytes > rules_.max_working_bytes ||
          (!running.holds_slot && running.seconds + at->second.seconds > kLongestHere)) {
        return;
      }
      sequences += more.sequences;
      tensor_bytes += more.tensor_bytes;
      working_bytes_ += more.working_bytes;
      running.working_bytes += more.working_bytes;
      running.seconds += at->second.seconds;
      Entry taken;
      at = queue_.remove(at, taken);
      running.batch.push_back(std::move(taken));
    }
    if (sequences >= rules_.max_batch_size || stopping_ || Clock::now() >= until) return;
    joined_.wait_until(lock, until);
  }
}

// Runs a batch and tells those whose jobs they were. No lock is held.
void Scheduler::execute(std::shared_ptr<Running> running) {
  std::vector<Job*> jobs;
  jobs.reserve(running->batch.size());
  std::int64_t units = 0;
  std::int64_t sequences = 0;
  for (const Entry& entry : running->batch) {
    jobs.push_back(entry.job.get());
    units += entry.job->measure();
    sequences += entry.job->sequences;
  }
  // For short ones too: what took little time for others may go on for ever with other values.
  begin(*running, stop_for(*jobs.front()));
  engine::Stop* const stop = running->stop.get();
  for (const Entry& entry : running->batch) {
    const auto& recording = entry.job->request->recording;
    if (!recording) continue;
    recording->mark_first(tracing::Mark::kGathered, std::max(running->since, entry.submitted));
    recording->mark_first(tracing::Mark::kStarted, running->started);
    recording->together(sequences);
  }
  std::vector<std::exception_ptr> errors(jobs.size());
  bool alone = jobs.size() == 1;
  if (!alone) {
    try {
      jobs.front()->run(jobs, stop);
    } catch (...) {
      alone = true;  // one of them may be at fault: the others must not suffer for it
    }
  }
  if (alone) {
    for (std::size_t index = 0; index < jobs.size(); ++index) {
      try {
        jobs[index]->run(std::span(&jobs[index], 1), stop);
      } catch (...) {
        errors[index] = std::current_exception();
      }
    }
  }
  const TimePoint ended = Clock::now();
  bool wake = false;
  {
    const std::lock_guard lock(mutex_);
    std::erase(running_, running);
    if (running->holds_slot) ++free_slots_;
    working_bytes_ -= running->working_bytes;
    if (running->wedged) {
      --wedged_;
      if (running->holds_slot) --wedged_slots_;
    }
    if (!errors.front() && !(stop && stop->requested())) {
      estimates_.observe(jobs.front()->key, units, attnserve::seconds(ended - running->started));
    }
    wake = !queue_.empty() && free_slots_ > 0 && idle_threads_ > 0;
    if (running_.empty()) ended_.notify_all();
  }
  if (wake) slot_free_.notify_one();
  if (running->wedged) {
    has_ended(*running);
  } else {
    tell(*running, errors, ended);
  }
}

// A run begins, which can be stopped from now on. `stop`: nullptr if it cannot.
void Scheduler::begin(Running& running, std::unique_ptr<engine::Stop> stop) {
  bool look = false;
  {
    const std::lock_guard lock(mutex_);
    const TimePoint now = running.started = Clock::now();
    running.stop = std::move(stop);
    // Whoever lost interest until now, as while the batch gathered, found nothing to stop.
    if (running.stop && (stopping_ || !wanted(running, now))) running.stop->request();
    if (rules_.max_run_seconds > 0) {
      running.due = after(now, rules_.max_run_seconds);
      look = running.due < next_look_;
      if (look) next_look_ = running.due;
    }
  }
  if (look) sooner_.notify_one();
}

// Tells those whose jobs they were what came of a run that is over. No lock is held.
void Scheduler::tell(const Running& running, std::span<const std::exception_ptr> errors,
                     TimePoint ended) {
  std::int64_t sequences = 0;
  for (const Entry& entry : running.batch) sequences += entry.job->sequences;
  const bool stopped = running.stop && running.stop->requested();
  bool leads = true;
  for (std::size_t index = 0; index < errors.size(); ++index) {
    Job& job = *running.batch[index].job;
    const RequestContext& request = *job.request;
    const TraceScope scope(request.trace);
    if (request.recording) request.recording->mark(tracing::Mark::kEnded, ended);
    if (!errors[index]) {
      job.done({running.batch[index].submitted, running.started, ended, sequences, leads});
      leads = false;
      continue;
    }
    Status status = attnserve::status_of(errors[index]);
    if (stopped) {
      // Why it was stopped is what its caller is told.
      if (auto lost = lost_interest(request, ended, "ended")) {
        status = std::move(*lost);
      } else if (running.overdue) {
        status = too_long();
      }
    }
    job.failed(std::move(status));
  }
}

// The life of a thread of ours: the next batch, as long as there is one.
void Scheduler::work() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    std::vector<std::pair<std::shared_ptr<Job>, Status>> dead;
    std::shared_ptr<Running> running = take(false, dead);
    if (running) gather(*running, lock);
    if (!running && dead.empty()) {
      ++idle_threads_;
      slot_free_.wait(lock);
      --idle_threads_;
      continue;
    }
    lock.unlock();
    for (auto& [job, status] : dead) job->failed(std::move(status));
    if (running) execute(std::move(running));
    lock.lock();
  }
}

}  // namespace attnserve::schedule
