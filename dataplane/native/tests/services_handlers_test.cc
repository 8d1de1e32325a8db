// Requests on their way to the control plane and back.
#include <doctest/doctest.h>

#include <thread>

#include "services/handled.h"
#include "services/handlers.h"
#include "services_support.h"

namespace attnserve::services {
namespace {

using Answers = std::vector<std::pair<Code, std::string>>;

std::shared_ptr<HandledRequest> request_to(Answers& answers, std::string path = "/a/Method") {
  return std::make_shared<HandledRequest>(std::move(path), "unix:", bytes_of("asked"),
                                          std::make_shared<schedule::RequestContext>(),
                                          [&answers](Status status, Bytes bytes) {
                                            answers.emplace_back(status.code, text_of(bytes));
                                          });
}

}  // namespace

TEST_CASE("a request is answered by its first answer alone") {
  Answers answers;
  auto request = request_to(answers);
  CHECK(text_of(request->message) == "asked");
  request->answer({}, bytes_of("one"));
  request->answer({Code::kInternal, "late", {}}, {});
  request.reset();
  CHECK(answers == Answers{{Code::kOk, "one"}});
}

TEST_CASE("a request that is dropped is answered too") {
  Answers answers;
  request_to(answers).reset();
  CHECK(answers == Answers{{Code::kInternal, ""}});
}

TEST_CASE("a queue gives requests in their order, and refuses those beyond its bound") {
  Answers answers;
  HandlerQueue queue(2);
  CHECK_FALSE(queue.push(request_to(answers, "/1")));
  CHECK_FALSE(queue.push(request_to(answers, "/2")));
  const std::optional<Status> refused = queue.push(request_to(answers, "/3"));
  REQUIRE(refused);
  CHECK(refused->code == Code::kResourceExhausted);
  CHECK(refused->message == "requests: 2 of this kind are waiting; allowed: 2");
  CHECK(refused->retry_after.count() > 0);
  CHECK(queue.pop(Duration::zero())->path == "/1");
  CHECK(queue.pop(Duration::zero())->path == "/2");
  CHECK(queue.pop(Duration::zero()) == nullptr);
}

TEST_CASE("a closed queue wakes who waits, gives what it holds and takes no more") {
  Answers answers;
  HandlerQueue queue(2);
  std::thread waits([&] { CHECK(queue.pop(std::chrono::hours(1))->path == "/1"); });
  CHECK_FALSE(queue.push(request_to(answers, "/1")));
  waits.join();
  std::thread waits_in_vain([&] { CHECK(queue.pop(std::chrono::hours(1)) == nullptr); });
  queue.close();
  waits_in_vain.join();
  const std::optional<Status> refused = queue.push(request_to(answers, "/2"));
  REQUIRE(refused);
  CHECK(refused->code == Code::kUnavailable);
}

TEST_CASE("what is handed over keeps its place until it is answered") {
  Core core({});
  std::vector<Status> ends;
  auto admitted = std::get<Admitted>(Admitted::admit(core, Clock::now(), kNever));
  admitted.received();
  hand_over(core.control, "/a/Method", "unix:", bytes_of("asked"),
            std::make_shared<schedule::RequestContext>(), std::move(admitted),
            [&](Delivery delivery) { ends.push_back(delivery.status); });
  CHECK(core.admission.inside() == 1);
  core.control.pop(Duration::zero())->answer({}, bytes_of("answer"));
  CHECK(core.admission.inside() == 0);
  REQUIRE(ends.size() == 1);
  CHECK(ends[0].ok());
}

TEST_CASE("what a full queue refuses gives its place back at once") {
  CoreOptions options;
  options.max_control_requests = 0;
  Core core(options);
  std::vector<Status> ends;
  hand_over(core.control, "/a/Method", "unix:", {}, std::make_shared<schedule::RequestContext>(),
            std::get<Admitted>(Admitted::admit(core, Clock::now(), kNever)),
            [&](Delivery delivery) { ends.push_back(delivery.status); });
  CHECK(core.admission.arriving() == 0);
  REQUIRE(ends.size() == 1);
  CHECK(ends[0].code == Code::kResourceExhausted);
}

TEST_CASE("a handled stream takes one message at a time and answers each") {
  Core core({});
  const auto call = std::make_shared<NotedCall>();
  const auto handler = handled_stream(core, core.control, call);
  for (const std::string answer : {"one", "two"}) {
    handler->on_message(bytes_of("asked"));
    CHECK(call->pauses() == 1);
    core.control.pop(Duration::zero())->answer({}, bytes_of(answer));
    CHECK(call->pauses() == 0);
  }
  CHECK(call->sent() == std::vector<std::string>{"one", "two"});
  CHECK_FALSE(call->finished());
  handler->on_half_close();
  REQUIRE(call->finished());
  CHECK(call->finished()->ok());
  handler->on_end(Code::kOk);
  CHECK(core.statistics.requests().empty());
}

TEST_CASE("a handled stream that has been read ends with its last answer, or its first error") {
  Core core({});
  for (const Code code : {Code::kOk, Code::kInvalidArgument}) {
    const auto call = std::make_shared<NotedCall>();
    const auto handler = handled_stream(core, core.control, call);
    handler->on_message(bytes_of("asked"));
    handler->on_half_close();
    CHECK_FALSE(call->finished());
    core.control.pop(Duration::zero())->answer({code, "", {}}, bytes_of("answer"));
    REQUIRE(call->finished());
    CHECK(call->finished()->code == code);
    CHECK(call->sent().size() == (code == Code::kOk ? 1 : 0));
    handler->on_end(Code::kOk);
  }
}

TEST_CASE("a drain ends handled streams: those that wait at once, others with their answer") {
  Core core({});
  const auto idle = std::make_shared<NotedCall>(), asking = std::make_shared<NotedCall>();
  const auto idle_handler = handled_stream(core, core.control, idle);
  const auto asking_handler = handled_stream(core, core.control, asking);
  asking_handler->on_message(bytes_of("asked"));
  core.streams.drain();
  REQUIRE(idle->finished());
  CHECK(idle->finished()->code == Code::kUnavailable);
  CHECK_FALSE(asking->finished());
  core.control.pop(Duration::zero())->answer({}, bytes_of("answer"));
  CHECK(asking->sent().size() == 1);
  REQUIRE(asking->finished());
  CHECK(asking->finished()->code == Code::kUnavailable);
}

TEST_CASE("whoever leaves a handled stream has its request cancelled") {
  Core core({});
  const auto handler = handled_stream(core, core.control, std::make_shared<NotedCall>());
  handler->on_message(bytes_of("asked"));
  const auto request = core.control.pop(Duration::zero());
  CHECK_FALSE(request->request->cancelled);
  handler->on_end(Code::kCancelled);
  CHECK(request->request->cancelled);
}

}  // namespace attnserve::services
