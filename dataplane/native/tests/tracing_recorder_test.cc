// Which calls are recorded, what is kept of them, and that neither grows without bound.
#include <doctest/doctest.h>

#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "tracing/recorder.h"

using namespace attnserve;
using namespace attnserve::tracing;

namespace {

thread_local std::size_t allocations = 0;

}  // namespace

// Counted, so that a test can tell that there was none.
void* operator new(std::size_t size) {
  ++allocations;
  if (void* found = std::malloc(size)) return found;
  throw std::bad_alloc();
}
void operator delete(void* found) noexcept { std::free(found); }
void operator delete(void* found, std::size_t) noexcept { std::free(found); }

namespace {

const TraceContext kSampled =
    *parse_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
const TraceContext kNotSampled =
    *parse_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00");

RecorderOptions options(double sample, double most_per_second = 1e9) {
  return {.enabled = true, .sample = sample, .most_per_second = most_per_second};
}

Record begun(const TraceContext& context = kSampled) {
  Record record;
  record.context = context;
  record.path = "/a/Method";
  return record;
}

TimePoint at(double seconds) {
  return TimePoint(std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds)));
}

TimePoint marked(const Record& record, Mark mark) {
  return record.marks[static_cast<std::size_t>(mark)];
}

std::vector<Record> all_of(Recorder& recorder) { return recorder.take(1U << 20, Duration::zero()); }

}  // namespace

TEST_CASE("the caller's flag decides, and chance where there is none") {
  const TimePoint now = Clock::now();
  Recorder never(options(0)), always(options(1));
  CHECK(never.wants(kSampled, now));
  CHECK_FALSE(never.wants({}, now));
  CHECK_FALSE(always.wants(kNotSampled, now));
  CHECK(always.wants({}, now));
  Recorder off({.enabled = false, .sample = 1, .most_per_second = 1e9});
  CHECK_FALSE(off.wants(kSampled, now));
  CHECK_FALSE(off.wants({}, now));
}

TEST_CASE("about as many as asked for are picked, by every thread") {
  Recorder recorder(options(0.1));
  std::array<int, 4> picked{};
  std::vector<std::thread> threads;
  for (int& count : picked) {
    threads.emplace_back([&] {
      for (int call = 0; call < 20'000; ++call) count += recorder.wants({}, Clock::now()) ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int count : picked) {
    CHECK(count > 1700);  // seven standard deviations
    CHECK(count < 2300);
  }
  CHECK(picked[0] + picked[1] != picked[2] + picked[3]);  // they do not throw the same coins
}

TEST_CASE("callers cannot have more recorded than so many a second") {
  Recorder recorder(options(0, 10));
  int recorded = 0;
  for (int call = 0; call < 10'000; ++call) {
    recorded += recorder.wants(kSampled, at(100 + call * 1e-4)) ? 1 : 0;
  }
  CHECK(recorded >= 10);
  CHECK(recorded <= 21);
  CHECK(recorder.counts().refused == 10'000 - recorded);
}

TEST_CASE("requests of a stream count as well") {
  Recorder recorder(options(0, 3));
  REQUIRE(recorder.wants(kSampled, at(1)));
  const auto call = recorder.begin(begun());
  int recorded = 0;
  for (int request = 0; request < 100; ++request) {
    recorded += call->request(std::to_string(request), at(1)) ? 1 : 0;
  }
  CHECK(recorded == 2);
}

TEST_CASE("a record is its caller's child, or begins a trace") {
  Recorder recorder(options(1));
  recorder.begin(begun());
  recorder.begin(begun({}));
  const std::vector<Record> records = all_of(recorder);
  REQUIRE(records.size() == 2);
  CHECK(records[0].context.trace_id == kSampled.trace_id);
  CHECK(records[0].parent == kSampled.span_id);
  CHECK(records[0].context.span_id != kSampled.span_id);
  CHECK(records[1].context.present());
  CHECK(records[1].parent == std::array<std::uint8_t, 8>{});
  CHECK(records[1].context.span_id != records[0].context.span_id);
}

TEST_CASE("a record keeps what is noted until it ends") {
  Recorder recorder(options(0));
  const auto recording = recorder.begin(begun());
  recording->mark(Mark::kArrived, at(1));
  recording->mark_first(Mark::kStarted, at(2));
  recording->mark_first(Mark::kStarted, at(3));
  recording->mark(Mark::kEnded, at(4));
  recording->mark(Mark::kEnded, at(5));
  recording->request_id("seven");
  recording->ran({"model", 3, "native", 2, 16, 32});
  recording->together(5);
  recording->status(Code::kOk);
  recording->status(Code::kInternal);
  CHECK(all_of(recorder).empty());
  recording->end();
  recording->end();
  recording->ran({"another", 4, "flash", 1, 1, 1});
  recording->mark(Mark::kEnded, at(6));
  CHECK_FALSE(recording->request("late", at(6)));
  const std::vector<Record> records = all_of(recorder);
  REQUIRE(records.size() == 1);
  const Record& record = records[0];
  CHECK(record.context.span_id == recording->context().span_id);
  CHECK(record.path == "/a/Method");
  CHECK(record.request_id == "seven");
  CHECK(record.model == "model");
  CHECK(record.version == 3);
  CHECK(record.variant == "native");
  CHECK(record.sequences == 2);
  CHECK(record.together == 5);
  CHECK(record.query_len == 16);
  CHECK(record.key_len == 32);
  CHECK(record.code == Code::kOk);
  CHECK(marked(record, Mark::kStarted) == at(2));
  CHECK(marked(record, Mark::kEnded) == at(5));
  CHECK(marked(record, Mark::kChecked) == TimePoint{});
  CHECK(marked(record, Mark::kFinished) != TimePoint{});
}

TEST_CASE("what nobody answered was cancelled, and is handed over all the same") {
  Recorder recorder(options(0));
  const auto call = recorder.begin(begun());
  auto request = call->request("1", at(2));
  REQUIRE(request);
  request.reset();
  {
    const OpenRecording open(call);
  }
  const std::vector<Record> records = all_of(recorder);
  REQUIRE(records.size() == 2);
  CHECK(records[0].of_stream);
  CHECK(records[0].parent == call->context().span_id);
  CHECK(records[0].context.trace_id == kSampled.trace_id);
  CHECK(records[0].path == "/a/Method");
  CHECK(records[0].code == Code::kCancelled);
  CHECK_FALSE(records[1].of_stream);
  CHECK(records[1].code == Code::kCancelled);
}

TEST_CASE("texts of callers are cut") {
  Recorder recorder(options(0));
  Record record = begun();
  record.caller = std::string(10'000, 'c');
  const auto recording = recorder.begin(std::move(record));
  recording->request_id(std::string(10'000, 'i'));
  recording->end();
  const std::vector<Record> records = all_of(recorder);
  REQUIRE(records.size() == 1);
  CHECK(records[0].caller == std::string(kMostText, 'c'));
  CHECK(records[0].request_id == std::string(kMostText, 'i'));
}

TEST_CASE("records that nobody takes are dropped, the oldest first, and counted") {
  RecorderOptions few = options(0);
  few.most_waiting = 3;
  Recorder recorder(few);
  for (int number = 0; number < 5; ++number) {
    recorder.begin(begun())->request_id(std::to_string(number));
  }
  std::vector<Record> records = recorder.take(2, Duration::zero());
  REQUIRE(records.size() == 2);
  CHECK(records[0].request_id == "2");
  CHECK(records[1].request_id == "3");
  CHECK(all_of(recorder).size() == 1);
  CHECK(recorder.counts().recorded == 5);
  CHECK(recorder.counts().dropped == 2);
}

TEST_CASE("whoever takes records is woken once there are enough") {
  Recorder recorder(options(0));
  std::thread adds([&] {
    for (int number = 0; number < 8; ++number) recorder.begin(begun());
  });
  CHECK(recorder.take(8, std::chrono::hours(1)).size() == 8);
  adds.join();
}

TEST_CASE("a call that is not recorded takes no memory") {
  Recorder recorder(options(0));
  recorder.wants({}, Clock::now());  // the thread's first coin has a seed
  const std::size_t before = allocations;
  for (int call = 0; call < 1000; ++call) {
    const auto given = parse_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00");
    REQUIRE(given);
    if (recorder.wants(*given, Clock::now()) || recorder.wants({}, Clock::now())) FAIL("recorded");
  }
  CHECK(allocations == before);
}
