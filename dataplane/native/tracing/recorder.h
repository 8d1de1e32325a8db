// Calls that are recorded for traces: when each part of them began, and what it was about. A few of
// all, picked when their headers have come; the others cost a comparison and a random number.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/rate.h"
#include "base/status.h"
#include "base/trace_context.h"

namespace attnserve::tracing {

// What a call goes through, in this order; it need not come by all of them.
enum class Mark : std::uint8_t {
  kArrived,   // its headers are there
  kAdmitted,  // it may send its body
  kReceived,  // its message is whole
  kTaken,     // a thread of the control plane has it
  kChecked,   // it waits to run
  kGathered,  // it was taken out of the queue; others may still join
  kStarted,   // to run
  kEnded,     // it has run
  kFinished,  // its answer is written; of a request on a stream: handed over to be written
};
constexpr std::size_t kMarks = 9;

// One call, or one request of a stream. A value.
struct Record {
  TraceContext context;                  // its own span
  std::array<std::uint8_t, 8> parent{};  // span; zeros: it begins the trace
  bool of_stream = false;                // its parent is its call, and not the caller's
  std::string trace_state;
  std::string path, peer;
  std::string caller;      // its name; empty: it has none
  std::string request_id;  // as its caller says it; empty: it does not
  std::string model, variant;
  std::int64_t version = 0;                  // of the model
  std::int64_t sequences = 0, together = 0;  // of the request, and of all that ran with it
  std::int64_t query_len = 0, key_len = 0;   // the longest of them, in tokens
  Code code = Code::kUnknown;
  std::array<TimePoint, kMarks> marks{};  // TimePoint{}: it did not come so far
};

// What texts of callers are cut to, in characters.
constexpr std::size_t kMostText = 128;

// What ran for it, as far as it is known.
struct Ran {
  std::string_view model;
  std::int64_t version = 0;
  std::string_view variant;
  std::int64_t sequences = 0, query_len = 0, key_len = 0;
};

class Recorder;

// A record that is being made. Any thread; once it has ended, nothing more is noted.
class Recording {
 public:
  Recording(Recorder& recorder, Record begun) : recorder_(recorder), record_(std::move(begun)) {}
  ~Recording() { end(); }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  void mark(Mark mark, TimePoint now);
  void mark_first(Mark mark, TimePoint now);  // unless it was there before
  void status(Code code);                     // that it is answered with; the first one counts
  void request_id(std::string_view id);
  void ran(const Ran& ran);
  void together(std::int64_t sequences);
  void end();  // hands it over
  // Of its own span.
  const TraceContext& context() const { return record_.context; }
  // Begins one for a request of this stream; nullptr: too many are recorded already.
  std::shared_ptr<Recording> request(std::string_view id, TimePoint arrived);

 private:
  Recorder& recorder_;
  std::mutex mutex_;  // guards what follows, but for the context, which stays
  Record record_;
  bool answered_ = false, ended_ = false;
};

// Ends a recording on destruction.
class OpenRecording {
 public:
  OpenRecording() = default;
  explicit OpenRecording(std::shared_ptr<Recording> recording) : recording_(std::move(recording)) {}
  OpenRecording(OpenRecording&& other) noexcept = default;
  OpenRecording& operator=(OpenRecording&& other) = delete;
  ~OpenRecording() {
    if (recording_) recording_->end();
  }
  Recording* operator->() const { return recording_.get(); }
  explicit operator bool() const { return recording_ != nullptr; }

 private:
  std::shared_ptr<Recording> recording_;
};

struct RecorderOptions {
  bool enabled = false;
  double sample = 0.0;           // of the calls that belong to no trace
  double most_per_second = 0.0;  // calls, and requests on streams
  std::size_t most_waiting = 4096;
};

struct RecorderCounts {
  std::uint64_t recorded = 0;  // begun
  std::uint64_t refused = 0;   // for there were too many in a second
  std::uint64_t dropped = 0;   // for nobody took them in time
};

// Any thread.
class Recorder {
 public:
  explicit Recorder(const RecorderOptions& options);

  // Whether a call of this context is to be recorded. Takes no memory.
  bool wants(const TraceContext& given, TimePoint now);
  // `begun`: with what is known of it; its context is the caller's, and becomes its own.
  std::shared_ptr<Recording> begin(Record begun);
  // Those that have ended, at most so many: as soon as there are as many, or after `timeout`.
  std::vector<Record> take(std::size_t most, Duration timeout);
  RecorderCounts counts() const;

 private:
  friend class Recording;
  bool within_rate(TimePoint now);
  void add(Record record) noexcept;

  const RecorderOptions options_;
  Rate rate_;
  std::atomic<std::uint64_t> recorded_{0}, refused_{0};
  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable came_;
  std::deque<Record> waiting_;
  std::size_t wanted_ = SIZE_MAX;  // whoever takes them waits for so many
  std::uint64_t dropped_ = 0;
};

}  // namespace attnserve::tracing
