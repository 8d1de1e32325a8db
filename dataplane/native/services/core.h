// What every request needs, made once for a server. Everything in it is safe to use from any thread
// and outlives all calls.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <variant>

#include "base/memory.h"
#include "base/pace.h"
#include "engine/model.h"
#include "grpc/call.h"
#include "identity/callers.h"
#include "requests/attend.h"
#include "requests/limits.h"
#include "schedule/admission.h"
#include "schedule/scheduler.h"
#include "services/chores.h"
#include "services/departures.h"
#include "services/handlers.h"
#include "services/statistics.h"
#include "sessions/kv_sessions.h"
#include "sessions/shared_memory.h"
#include "sessions/stored_tensors.h"
#include "sessions/uploads.h"
#include "tracing/recorder.h"

namespace attnserve::services {

// A stream that is open, as others reach it. Both throw nothing.
struct OpenStream {
  bool has_sessions = false;  // of KV: it goes on while they are moved
  std::function<void()> drain;
  std::function<void(Bytes message)> tell;
};

// The streams that are open now, so that a drain can end them, and what has moved be told.
class OpenStreams {
 public:
  // Drains it once the server drains; at once if it does already. The number is for `remove`.
  std::uint64_t add(OpenStream stream);
  void remove(std::uint64_t number);
  // What is sent to a stream besides answers, if it is open.
  void tell(std::uint64_t number, Bytes message);
  void drain_without_sessions();
  void drain();

 private:
  void drain_some(bool all);

  std::mutex mutex_;  // guards what follows
  std::unordered_map<std::uint64_t, OpenStream> open_;
  std::uint64_t last_ = 0;
  bool draining_others_ = false, draining_ = false;
};

// Who watches the server's health.
class HealthWatchers {
 public:
  using Tell = std::function<void()>;
  // Calls `tell` now and whenever the health may have changed, by one thread at a time.
  std::uint64_t add(Tell tell);
  void remove(std::uint64_t number);
  void changed();

 private:
  std::mutex mutex_;  // guards what follows, and is held while they are told
  std::unordered_map<std::uint64_t, Tell> watching_;
  std::uint64_t last_ = 0;
};

struct CoreOptions {
  requests::Limits limits;
  schedule::Rules rules;
  PaceRule upload_pace;
  std::size_t io_threads = 2;
  std::size_t max_stored_bytes = 1024U << 20;
  Duration stored_lease = std::chrono::minutes(5);
  Duration max_stored_lease = std::chrono::hours(1);
  std::size_t max_shared_regions = 256;
  std::size_t max_shared_bytes = 16384ULL << 20;
  sessions::KvConfig kv;
  identity::CallersOptions callers;
  tracing::RecorderOptions tracing;
  std::size_t max_control_requests = 64;  // for the control plane, waiting
  std::size_t max_token_requests = 256;
  std::size_t max_web_tokens = 64;  // to be checked, waiting
};

struct Core {
  explicit Core(const CoreOptions& options)
      : limits(options.limits),
        upload_pace(options.upload_pace),
        recorder(options.tracing),
        budget(options.limits.max_bytes_in_flight),
        callers(options.callers, budget),
        stream_uploads(options.limits.max_bytes_in_flight, "--max-in-flight-mib"),
        stored_uploads(options.max_stored_bytes, "--max-stored-mib"),
        stored(options.max_stored_bytes, options.stored_lease, options.max_stored_lease),
        regions(options.max_shared_regions, options.max_shared_bytes),
        kv(options.kv),
        control(options.max_control_requests),
        loading(options.max_control_requests),
        tokens(options.max_token_requests),
        web_tokens(options.max_web_tokens),
        admission(options.rules.max_queue_seconds, static_cast<std::size_t>(options.rules.patience),
                  options.io_threads, options.rules.slots),
        scheduler(with_health(options.rules)),
        chores([this] { kv.tidy(); }) {}

  requests::Context context() { return {models, limits, stored, regions}; }
  // Whether requests should come here: it serves, and nothing in it is wedged.
  bool ready() const { return serving && scheduler.wedged() == 0; }

  const requests::Limits limits;
  const PaceRule upload_pace;  // of what comes in several messages
  tracing::Recorder recorder;  // of calls, for traces
  ByteBudget budget;
  identity::Callers callers;         // each with a part of the budget
  sessions::Uploads stream_uploads;  // requests of AttendStream whose chunks are coming
  sessions::Uploads stored_uploads;  // by PutTensor
  engine::ModelStore models;
  sessions::StoredTensors stored;
  sessions::SharedRegions regions;
  sessions::KvSessions kv;
  Statistics statistics;
  OpenStreams streams;
  HealthWatchers health;
  HandlerQueue control;     // methods of the control plane
  HandlerQueue loading;     // those of them that load models, and take their time
  HandlerQueue tokens;      // requests of token models
  HandlerQueue web_tokens;  // JSON Web Tokens to be checked
  std::atomic<bool> serving{false};
  // Its sessions are being moved to other servers: it takes nothing new, but what belongs to them.
  std::atomic<bool> moving{false};
  Departures departures;
  schedule::AdmissionController admission;
  schedule::Scheduler scheduler;  // its jobs use what is above
  Chores chores;

 private:
  schedule::Rules with_health(schedule::Rules rules) {
    rules.wedged_changed = [this] { health.changed(); };
    return rules;
  }
};

// What a call's messages and answers are charged to: its caller's part of the budget.
inline ByteBudget& budget_of(Core& core, const grpc::CallInfo& info) {
  return info.caller ? info.caller->in_flight : core.budget;
}

// One request's place before others: taken by `admit`, given back exactly once.
class Admitted {
 public:
  Admitted() = default;
  Admitted(Admitted&& other) noexcept
      : admission_(std::exchange(other.admission_, nullptr)),
        place_(other.place_),
        answered_(other.answered_) {}
  Admitted& operator=(Admitted&& other) noexcept;
  ~Admitted() { release(); }

  // Asks for a place, from what the headers say. Draining servers refuse with UNAVAILABLE; those
  // that move sessions only new calls.
  static std::variant<Admitted, Status> admit(Core& core, TimePoint now, TimePoint deadline);
  // The same for one request of a stream, which counts as one of its caller's.
  static std::variant<Admitted, Status> admit_next(Core& core, const grpc::CallInfo& info,
                                                   TimePoint now, TimePoint deadline);
  void received();                       // its body is complete
  void answered() { answered_ = true; }  // the answer counts for the pace of the server
  void release();

 private:
  Admitted(schedule::AdmissionController& admission, schedule::AdmissionController::Place place)
      : admission_(&admission), place_(place) {}
  schedule::AdmissionController* admission_ = nullptr;
  schedule::AdmissionController::Place place_;
  bool answered_ = false;
};

}  // namespace attnserve::services
