// A computation to schedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "engine/attend.h"
#include "engine/session.h"
#include "schedule/request_context.h"

namespace attnserve::schedule {

// What came of a job that ran.
struct Outcome {
  TimePoint submitted{}, started{}, ended{};
  std::int64_t sequences = 0;  // that ran together, other callers' included
  bool leads = false;          // true for one job of each execution
};

class Job {
 public:
  virtual ~Job() = default;

  std::shared_ptr<RequestContext> request;
  engine::BatchKey key{};  // jobs of equal key take alike long a unit
  bool joinable = false;   // and may run together if both are
  std::int64_t sequences = 1;
  std::int64_t units = 0;         // what its time is proportional to; 0: its sequences
  std::size_t tensor_bytes = 0;   // that joining copies
  std::size_t working_bytes = 0;  // estimated memory that it takes while it runs

  std::int64_t measure() const { return units > 0 ? units : sequences; }
  // Runs this job and others of its key, itself included, as one. Throws if that fails for all.
  virtual void run(std::span<Job* const> batch, engine::Stop* stop) = 0;
  virtual std::unique_ptr<engine::Stop> make_stop() = 0;
  // Exactly one of these three, once, on whichever thread; none blocks or throws.
  virtual void done(const Outcome& outcome) noexcept = 0;
  virtual void failed(Status status) noexcept = 0;
  // It still runs, on another thread, though it was stopped: its caller is told, and all that the
  // run reads and writes stays where it is until this job is destroyed.
  virtual void abandoned(Status status) noexcept { failed(std::move(status)); }
  // What it computes, for the log.
  virtual std::string what() const { return {}; }
};

}  // namespace attnserve::schedule
