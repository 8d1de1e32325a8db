#include <doctest/doctest.h>

#include "base/pace.h"

namespace attnserve::test {
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

const TimePoint kStart{seconds(1000)};
const PaceRule kRule{100, seconds(10)};

Pace begun() {
  Pace pace(kRule);
  pace.begin(kStart);
  return pace;
}

}  // namespace

TEST_CASE("who has not begun is not late") {
  Pace pace(kRule);
  pace.took(5, kStart);
  pace.forgive(seconds(1));
  CHECK(pace.due() == kNever);
}

TEST_CASE("whoever sends nothing is late after the grace") {
  CHECK(begun().due() == kStart + seconds(10));
}

TEST_CASE("every byte buys the time that it may take") {
  Pace pace = begun();
  pace.took(50, kStart + seconds(1));
  CHECK(pace.due() == kStart + milliseconds(10'500));
  pace.took(200, kStart + seconds(9));
  CHECK(pace.due() == kStart + milliseconds(12'500));
}

TEST_CASE("whoever stops is late two graces after, however much had come") {
  Pace pace = begun();
  pace.took(std::size_t{1} << 60, kStart + seconds(3));
  CHECK(pace.due() == kStart + seconds(23));
  pace.took(1, kStart + seconds(4));
  CHECK(pace.due() == kStart + seconds(23) + milliseconds(10));
  pace.took(1000, kStart + seconds(5));
  CHECK(pace.due() == kStart + seconds(25));
}

TEST_CASE("whoever sends just fast enough is never late") {
  Pace pace = begun();
  for (int second = 1; second < 1000; ++second) {
    CHECK(pace.due() > kStart + seconds(second));
    pace.took(100, kStart + seconds(second));
  }
}

TEST_CASE("time in which nothing could be sent does not count, whatever comes next") {
  Pace pace = begun();
  pace.forgive(seconds(60));
  CHECK(pace.due() == kStart + seconds(70));
  pace.took(100, kStart + seconds(20));
  CHECK(pace.due() == kStart + seconds(70));
  pace.begin(kStart + seconds(30));
  CHECK(pace.due() == kStart + seconds(40));
}

TEST_CASE("without a rule nobody is late") {
  for (const PaceRule& rule : {PaceRule{0, seconds(10)}, PaceRule{100, Duration::zero()}}) {
    Pace pace(rule);
    pace.begin(kStart);
    pace.took(1, kStart);
    CHECK(pace.due() == kNever);
  }
}

TEST_CASE("the status says what was asked for") {
  const Status status = begun().late("chunks");
  CHECK(status.code == Code::kDeadlineExceeded);
  CHECK(status.message ==
        "chunks: given less than 100.0 bytes a second for longer than 10.0 seconds; allowed: at "
        "least as much");
}

}  // namespace attnserve::test
