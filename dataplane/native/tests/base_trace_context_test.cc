// What callers say of traces: read as the specification has it, or not at all.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "base/log.h"
#include "base/text.h"
#include "base/trace_context.h"

using namespace attnserve;

namespace {

const std::string kTrace = "4bf92f3577b34da6a3ce929d0e0e4736";
const std::string kSpan = "00f067aa0ba902b7";
const std::string kGood = "00-" + kTrace + "-" + kSpan + "-01";

}  // namespace

TEST_CASE("a traceparent is what it says") {
  const auto context = parse_traceparent(kGood);
  REQUIRE(context);
  CHECK(context->present());
  CHECK(hex_of(context->trace_id) == kTrace);
  CHECK(hex_of(context->span_id) == kSpan);
  CHECK(context->sampled);
  CHECK_FALSE(TraceContext{}.present());
}

TEST_CASE("of the flags only the lowest counts") {
  const std::string head = kGood.substr(0, 53);
  for (const char* flags : {"01", "03", "ff", "b1"}) {
    CHECK_MESSAGE(parse_traceparent(head + flags)->sampled, flags);
  }
  for (const char* flags : {"00", "02", "fe"}) {
    CHECK_MESSAGE(!parse_traceparent(head + flags)->sampled, flags);
  }
}

TEST_CASE("a traceparent that breaks the rules is none") {
  const std::string zeros(32, '0');
  for (const std::string& bad :
       std::vector<std::string>{"",
                                "00",
                                kGood.substr(0, 54),
                                kGood + "-",
                                kGood + "-01",
                                kGood + "0",
                                " " + kGood,
                                kGood + " ",
                                text("ff", kGood.substr(2)),
                                text("0x", kGood.substr(2)),
                                text("0A", kGood.substr(2)),
                                text("00-", zeros, "-", kSpan, "-01"),
                                text("00-", kTrace, "-", zeros.substr(16), "-01"),
                                text("00-4BF92F3577B34DA6A3CE929D0E0E4736-", kSpan, "-01"),
                                "00-" + kTrace + "-00F067AA0BA902B7-01",
                                "00-" + kTrace + "-" + kSpan + "-0G",
                                "00-" + kTrace + "-" + kSpan + "_01",
                                "00_" + kTrace + "-" + kSpan + "-01",
                                "00-" + kTrace + "." + kSpan + "-01",
                                text("00-", kTrace.substr(1), "g-", kSpan, "-01"),
                                text("00-", kTrace.substr(1), "-0", kSpan, "-01"),
                                text("00-", std::string(32, '\0'), "-", kSpan, "-01")}) {
    CHECK_MESSAGE(!parse_traceparent(bad), bad);
  }
}

TEST_CASE("of a version to come the beginning is understood") {
  for (const std::string& later :
       {text("01", kGood.substr(2)), text("fe", kGood.substr(2), "-more"),
        text("cc", kGood.substr(2), "-")}) {
    const auto context = parse_traceparent(later);
    REQUIRE_MESSAGE(context, later);
    CHECK(hex_of(context->trace_id) == kTrace);
    CHECK(context->sampled);
  }
  CHECK_FALSE(parse_traceparent(text("01", kGood.substr(2), "more")));
  CHECK_FALSE(parse_traceparent(text("01", kGood.substr(2), ".")));
}

TEST_CASE("a tracestate is a list of keys and values") {
  std::string members;
  for (int number = 0; number < 32; ++number) {
    members += text(number ? "," : "", "k", number, "=v");
  }
  for (const std::string& good : std::vector<std::string>{
           "rojo=00f067aa0ba902b7", "rojo=1,congo=t61rcWkgMzE", " rojo=1\t, congo=2 ,",
           "fw529a3039@dt=FfAQ", "0a@b=c", "a_-*/9=!\"#$%&'()*+-./:;<>?@[]^_`{|}~ x", ",a=b",
           std::string(256, 'k') + "=v", text("a=", std::string(256, 'v')), members}) {
    CHECK_MESSAGE(is_tracestate(good), good);
  }
  for (const std::string& bad : std::vector<std::string>{"",
                                                         " ",
                                                         ",",
                                                         "a",
                                                         "a=",
                                                         "=b",
                                                         "A=b",
                                                         "0a=b",
                                                         "a=b=c",
                                                         "a=b,a=c",
                                                         "a b=c",
                                                         "a@=b",
                                                         "@a=b",
                                                         "a@b@c=d",
                                                         "a@0b=c",
                                                         "a=\x7f",
                                                         "a=b\xc3\xa4",
                                                         "a\xc3\xa4=b",
                                                         std::string(257, 'k') + "=v",
                                                         std::string(242, 'k') + "@s=v",
                                                         text("k@", std::string(15, 's'), "=v"),
                                                         text("a=", std::string(257, 'v')),
                                                         members + ",last=v"}) {
    CHECK_MESSAGE(!is_tracestate(bad), bad);
  }
}

TEST_CASE("what a thread logs within a scope belongs to its trace") {
  std::vector<std::string> lines;
  set_log_sink([&](const LogRecord& record) { lines.push_back(json_line(record)); });
  const TraceContext context = *parse_traceparent(kGood), none;
  log(Level::kInfo, "before");
  {
    const TraceScope scope(context);
    log(Level::kInfo, "within", {{"field", "value"}});
    {
      const TraceScope inner(none);
      log(Level::kInfo, "of another");
    }
    log(Level::kInfo, "within again");
  }
  log(Level::kInfo, "after");
  set_log_sink({});
  REQUIRE(lines.size() == 5);
  const std::string ids = R"("trace_id": ")" + kTrace + R"(", "span_id": ")" + kSpan + "\"}";
  for (const std::size_t index : {0, 2, 4})
    CHECK(lines[index].find("trace_id") == std::string::npos);
  CHECK(lines[1].ends_with(R"("field": "value", )" + ids));
  CHECK(lines[3].ends_with(ids));
}
