// What is recorded of calls on their way through the services.
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "services/router.h"
#include "services/stream_state.h"
#include "services/unary.h"
#include "services_support.h"

using namespace attnserve;
using namespace attnserve::services;
using tracing::Mark;
using tracing::Record;

namespace {

const std::string kAttention = "/attnserve.v1.AttentionService/";
const TraceContext kTrace =
    *parse_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");

CoreOptions recording(bool guarded = false) {
  CoreOptions options;
  options.limits.max_bytes_in_flight = 1U << 20;
  options.limits.max_message_bytes = 1U << 20;
  options.kv.max_bytes = 0;
  options.callers.required = guarded;
  options.tracing = {.enabled = true, .sample = 0, .most_per_second = 1e9};
  return options;
}

struct Served {
  Core core;
  Router router{core};

  explicit Served(const CoreOptions& options = recording()) : core(options) { core.serving = true; }
  std::vector<Record> records() { return core.recorder.take(1000, Duration::zero()); }
};

TimePoint marked(const Record& record, Mark mark) {
  return record.marks[static_cast<std::size_t>(mark)];
}

// What a connection does with a call that is over.
void end(std::variant<grpc::Reception, Status>& accepted, Code reason) {
  auto& reception = std::get<grpc::Reception>(accepted);
  reception.handler->on_end(reason);
  reception.handler.reset();
  reception.kept.reset();
}

}  // namespace

TEST_CASE("a call of a trace is recorded from its headers to its end") {
  Served it;
  const auto call = std::make_shared<NotedCall>(kAttention + "Attend", "", kTrace);
  auto accepted = it.router.accept(call);
  REQUIRE(std::holds_alternative<grpc::Reception>(accepted));
  REQUIRE(call->info().recording);
  std::get<grpc::Reception>(accepted).handler->on_message(bytes_of("\xFF"));
  REQUIRE(call->finished());
  CHECK(it.records().empty());
  end(accepted, Code::kOk);
  const auto records = it.records();
  REQUIRE(records.size() == 1);
  const Record& record = records[0];
  CHECK(record.context.trace_id == kTrace.trace_id);
  CHECK(record.parent == kTrace.span_id);
  CHECK(record.path == kAttention + "Attend");
  CHECK(record.peer == "ipv4:127.0.0.1");
  CHECK(record.code == Code::kInvalidArgument);
  CHECK(marked(record, Mark::kArrived) == call->info().arrived);
  CHECK(marked(record, Mark::kArrived) <= marked(record, Mark::kAdmitted));
  CHECK(marked(record, Mark::kAdmitted) <= marked(record, Mark::kReceived));
  CHECK(marked(record, Mark::kReceived) <= marked(record, Mark::kFinished));
  CHECK(marked(record, Mark::kStarted) == TimePoint{});
}

TEST_CASE("a call that its caller gave up was cancelled") {
  Served it;
  const auto call = std::make_shared<NotedCall>(kAttention + "Attend", "", kTrace);
  auto accepted = it.router.accept(call);
  end(accepted, Code::kCancelled);
  const auto records = it.records();
  REQUIRE(records.size() == 1);
  CHECK(records[0].code == Code::kCancelled);
}

TEST_CASE("a call that is refused by its headers is recorded with its status") {
  Served it;
  it.core.scheduler.drain();
  const auto call = std::make_shared<NotedCall>(kAttention + "Attend", "", kTrace);
  CHECK(std::holds_alternative<Status>(it.router.accept(call)));
  const auto records = it.records();
  REQUIRE(records.size() == 1);
  CHECK(records[0].code == Code::kUnavailable);
  CHECK(marked(records[0], Mark::kAdmitted) == TimePoint{});
}

TEST_CASE("who is not known, and probes, are not recorded") {
  Served it(recording(true));
  for (const std::string& path :
       {kAttention + "Attend", std::string("/grpc.health.v1.Health/Check"),
        std::string("/no.Service/Method")}) {
    const auto call = std::make_shared<NotedCall>(path, "Bearer wrong", kTrace);
    it.router.accept(call);
    CHECK_FALSE(call->info().recording);
  }
  CHECK(it.core.recorder.counts().recorded == 0);
}

TEST_CASE("a call without a trace is left alone") {
  Served it;
  const auto call = std::make_shared<NotedCall>(kAttention + "ListModels");
  auto accepted = it.router.accept(call);
  CHECK_FALSE(call->info().recording);
  std::get<grpc::Reception>(accepted).handler->on_message(bytes_of(""));
  const auto request = it.core.control.pop(Duration::zero());
  REQUIRE(request);
  CHECK_FALSE(request->request->recording);
  CHECK_FALSE(request->request->trace.present());
}

TEST_CASE("the control plane's part is recorded, and it is told the span") {
  Served it;
  const auto call = std::make_shared<NotedCall>(kAttention + "ListModels", "", kTrace);
  auto accepted = it.router.accept(call);
  std::get<grpc::Reception>(accepted).handler->on_message(bytes_of(""));
  const auto request = it.core.control.pop(Duration::zero());
  REQUIRE(request);
  CHECK(request->request->trace.trace_id == kTrace.trace_id);
  CHECK(request->request->trace.span_id == call->info().recording->context().span_id);
  request->answer({}, bytes_of("answer"));
  end(accepted, Code::kOk);
  const auto records = it.records();
  REQUIRE(records.size() == 1);
  CHECK(records[0].code == Code::kOk);
  CHECK(marked(records[0], Mark::kReceived) <= marked(records[0], Mark::kTaken));
}

TEST_CASE("requests of a stream are children of its call") {
  Served it;
  const auto call = std::make_shared<NotedCall>(kAttention + "AttendStream", "", kTrace);
  auto accepted = it.router.accept(call);
  const auto state = StreamState::open(it.core, call, "AttendStream");
  const auto request = stream_request(call->info(), "7");
  REQUIRE(request->recording);
  CHECK(request->trace.span_id == request->recording->context().span_id);
  state->begun();
  state->started(request);
  state->answer(request, {{Code::kNotFound, "no such model", {}}, {}});
  const auto first = it.records();
  REQUIRE(first.size() == 1);
  CHECK(first[0].of_stream);
  CHECK(first[0].request_id == "7");
  CHECK(first[0].parent == call->info().recording->context().span_id);
  CHECK(first[0].code == Code::kNotFound);
  state->read_all();
  end(accepted, Code::kOk);
  const auto last = it.records();
  REQUIRE(last.size() == 1);
  CHECK_FALSE(last[0].of_stream);
  CHECK(last[0].code == Code::kOk);
}

TEST_CASE("a request's own id is kept") {
  Served it;
  auto call = std::make_shared<NotedCall>(kAttention + "Attend", "", kTrace);
  call->add_metadata("x-request-id", std::string(1000, 'r'));
  auto accepted = it.router.accept(call);
  end(accepted, Code::kOk);
  const auto records = it.records();
  REQUIRE(records.size() == 1);
  CHECK(records[0].request_id == std::string(tracing::kMostText, 'r'));
}
