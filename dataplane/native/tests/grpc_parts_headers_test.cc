// What header fields say and are.
#include <doctest/doctest.h>

#include "grpc/headers.h"
#include "grpc_harness.h"

namespace attnserve::grpc::test {

TEST_CASE("timeouts are up to eight digits and a unit") {
  CHECK(parse_timeout("5H") == std::chrono::hours(5));
  CHECK(parse_timeout("5M") == std::chrono::minutes(5));
  CHECK(parse_timeout("5S") == std::chrono::seconds(5));
  CHECK(parse_timeout("5m") == std::chrono::milliseconds(5));
  CHECK(parse_timeout("5u") == std::chrono::microseconds(5));
  CHECK(parse_timeout("5n") == std::chrono::nanoseconds(5));
  CHECK(parse_timeout("00000000n") == Duration::zero());
  CHECK(parse_timeout("99999999H") == Duration::max());
  for (const std::string_view bad :
       {"", "S", "5", "5s", "-5S", "+5S", "5.0S", "123456789S", "5 S", " 5S", "5SS"}) {
    CHECK_FALSE(parse_timeout(bad));
  }
}

TEST_CASE("a deadline that the clock cannot hold is none") {
  RequestHeaders headers(1000);
  headers.add("grpc-timeout", "99999999H");
  CHECK(headers.take_info(TimePoint(std::chrono::hours(1))).deadline == kNever);
  headers.clear();
  headers.add("grpc-timeout", "2562047H");  // just below 2^63 nanoseconds
  CHECK(headers.take_info(TimePoint(std::chrono::hours(1))).deadline == kNever);
}

TEST_CASE("messages are percent-encoded and shortened") {
  CHECK(message_text("plain text, ~!") == "plain text, ~!");
  CHECK(message_text("100%") == "100%25");
  CHECK(message_text("a\nb\x7f\xC3\xA9") == "a%0Ab%7F%C3%A9");
  CHECK(message_text(" edges ") == "%20edges%20");
  CHECK(message_text(std::string(640, 'x')) == std::string(640, 'x'));
  CHECK(message_text(std::string(641, 'x')) == std::string(640, 'x') + " ...");
  std::string accents;
  std::string encoded;
  for (int i = 0; i < 640; ++i) {
    accents += "\xC3\xA9";
    encoded += "%C3%A9";
  }
  CHECK(message_text(accents) == encoded);
  CHECK(message_text(accents + "x") == encoded + " ...");
}

TEST_CASE("trailers carry status, message and when to retry") {
  const Status status{Code::kResourceExhausted, "full", std::chrono::microseconds(1'234'567)};
  Fields fields;
  const AnswerFields trailers = AnswerFields::trailers(status);
  for (const nghttp2_nv& field : trailers.fields()) {
    fields.emplace_back(std::string(reinterpret_cast<char*>(field.name), field.namelen),
                        std::string(reinterpret_cast<char*>(field.value), field.valuelen));
  }
  CHECK(fields == Fields{{"grpc-status", "8"}, {"grpc-message", "full"}, {"retry-after", "1.235"}});
}

}  // namespace attnserve::grpc::test
