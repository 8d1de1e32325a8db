#include "tracing/recorder.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/random.h"
#include "base/text.h"

namespace attnserve::tracing {
namespace {

// A number from 0 to 1, without a lock: the generator of S. Vigna, "SplitMix64"
// (https://prng.di.unimi.it/splitmix64.c). Nothing secret hangs on it.
double coin() {
  thread_local std::uint64_t state = [] {
    std::array<std::uint8_t, 8> seed{};
    fill_random(seed);
    std::uint64_t number = 0;
    for (const std::uint8_t byte : seed) number = number << 8 | byte;
    return number;
  }();
  std::uint64_t bits = state += 0x9E3779B97F4A7C15U;
  bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9U;
  bits = (bits ^ bits >> 27) * 0x94D049BB133111EBU;
  bits ^= bits >> 31;
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

std::string bounded(std::string_view text) {
  return std::string(first_characters(text, kMostText));
}

}  // namespace

void Recording::mark(Mark mark, TimePoint now) {
  const std::lock_guard lock(mutex_);
  record_.marks[static_cast<std::size_t>(mark)] = now;
}

void Recording::mark_first(Mark mark, TimePoint now) {
  const std::lock_guard lock(mutex_);
  TimePoint& marked = record_.marks[static_cast<std::size_t>(mark)];
  if (marked == TimePoint{}) marked = now;
}

void Recording::status(Code code) {
  const std::lock_guard lock(mutex_);
  if (!std::exchange(answered_, true)) record_.code = code;
}

void Recording::request_id(std::string_view id) {
  const std::lock_guard lock(mutex_);
  if (!ended_) record_.request_id = bounded(id);
}

void Recording::ran(const Ran& ran) {
  const std::lock_guard lock(mutex_);
  if (ended_) return;
  record_.model = ran.model;
  record_.version = ran.version;
  record_.variant = ran.variant;
  record_.sequences = ran.sequences;
  record_.query_len = ran.query_len;
  record_.key_len = ran.key_len;
}

void Recording::together(std::int64_t sequences) {
  const std::lock_guard lock(mutex_);
  record_.together = sequences;
}

void Recording::end() {
  Record ended;
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(ended_, true)) return;
    const TraceContext context = record_.context;
    ended = std::move(record_);
    record_.context = context;  // others may look at it still
  }
  if (ended.code == Code::kUnknown) ended.code = Code::kCancelled;  // nobody answered it
  TimePoint& finished = ended.marks[static_cast<std::size_t>(Mark::kFinished)];
  if (finished == TimePoint{}) finished = Clock::now();
  recorder_.add(std::move(ended));
}

std::shared_ptr<Recording> Recording::request(std::string_view id, TimePoint arrived) {
  if (!recorder_.within_rate(arrived)) return nullptr;
  Record begun;
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return nullptr;
    begun.context = record_.context;
    begun.trace_state = record_.trace_state;
    begun.path = record_.path;
    begun.peer = record_.peer;
    begun.caller = record_.caller;
  }
  begun.of_stream = true;
  begun.request_id = bounded(id);
  begun.marks[static_cast<std::size_t>(Mark::kArrived)] = arrived;
  return recorder_.begin(std::move(begun));
}

Recorder::Recorder(const RecorderOptions& options) : options_(options) {
  rate_.set(options.most_per_second);
}

bool Recorder::wants(const TraceContext& given, TimePoint now) {
  if (!options_.enabled) return false;
  const bool wanted = given.present() ? given.sampled : coin() < options_.sample;
  return wanted && within_rate(now);
}

bool Recorder::within_rate(TimePoint now) {
  if (!rate_.take(now)) return true;
  refused_.fetch_add(1, std::memory_order_relaxed);
  return false;
}

std::shared_ptr<Recording> Recorder::begin(Record begun) {
  recorded_.fetch_add(1, std::memory_order_relaxed);
  begun.caller = bounded(begun.caller);
  begun.request_id = bounded(begun.request_id);
  begun.parent = begun.context.span_id;
  if (!begun.context.present()) fill_random(begun.context.trace_id);
  fill_random(begun.context.span_id);
  begun.context.sampled = true;
  return std::make_shared<Recording>(*this, std::move(begun));
}

void Recorder::add(Record record) noexcept try {
  bool enough = false;
  {
    const std::lock_guard lock(mutex_);
    if (waiting_.size() >= options_.most_waiting) {
      waiting_.pop_front();
      ++dropped_;
    }
    waiting_.push_back(std::move(record));
    enough = waiting_.size() >= wanted_;
  }
  if (enough) came_.notify_one();
} catch (...) {
  // No memory for it: it is lost, and what it tells of goes on.
}

std::vector<Record> Recorder::take(std::size_t most, Duration timeout) {
  std::unique_lock lock(mutex_);
  wanted_ = most;
  came_.wait_for(lock, timeout, [&] { return waiting_.size() >= most; });
  wanted_ = SIZE_MAX;
  const auto end = waiting_.begin() + static_cast<std::ptrdiff_t>(std::min(most, waiting_.size()));
  std::vector<Record> taken(std::make_move_iterator(waiting_.begin()),
                            std::make_move_iterator(end));
  waiting_.erase(waiting_.begin(), end);
  return taken;
}

RecorderCounts Recorder::counts() const {
  const std::lock_guard lock(mutex_);
  return {recorded_.load(std::memory_order_relaxed), refused_.load(std::memory_order_relaxed),
          dropped_};
}

}  // namespace attnserve::tracing
