#include <doctest/doctest.h>

#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "sessions/uploads.h"

using namespace attnserve;
using namespace attnserve::sessions;

namespace {

constexpr std::string_view kHere = "ipv4:10.0.0.1:4242";
constexpr std::string_view kThere = "ipv6:%5B2001:db8::1%5D:4242";

std::optional<Status> refusal(Upload& upload, std::size_t more) {
  try {
    upload.take(more);
  } catch (const RequestError& error) {
    return error.status();
  }
  return std::nullopt;
}

}  // namespace

TEST_CASE("one upload may take all that there is") {
  Uploads uploads(100, "--option");
  Upload upload = uploads.begin(kHere);
  for (int i = 0; i < 10; ++i) CHECK_FALSE(refusal(upload, 10));
}

TEST_CASE("several uploads of one caller hold at most half, from whichever ports they come") {
  Uploads uploads(100, "--option");
  Upload first = uploads.begin(kHere), second = uploads.begin("ipv4:10.0.0.1:5555");
  first.take(30);
  second.take(20);
  const std::optional<Status> refused = refusal(second, 1);
  REQUIRE(refused);
  CHECK(refused->code == Code::kResourceExhausted);
  CHECK(refused->message ==
        "uploads: given 51 bytes in 2 under way; allowed: 50 of one caller, half of --option");
  CHECK(refused->retry_after.count() > 0);
  // Another caller's are another's, and this one's own are its own again once they are over.
  for (const std::string_view other : {kThere, std::string_view("unix:")}) {
    Upload upload = uploads.begin(other);
    CHECK_FALSE(refusal(upload, 50));
  }
  first = {};
  CHECK_FALSE(refusal(second, 30));
}

TEST_CASE("what was taken is given back once, wherever an upload is moved to") {
  Uploads uploads(100, "--option");
  {
    Upload first = uploads.begin(kHere);
    first.take(40);
    std::vector<Upload> moved;
    moved.push_back(std::move(first));
    moved.push_back(uploads.begin(kHere));
    moved[1].take(10);
    moved[0] = std::move(moved[1]);
    CHECK_FALSE(refusal(moved[0], 90));  // alone again
  }
  Upload first = uploads.begin(kHere), second = uploads.begin(kHere);
  CHECK_FALSE(refusal(second, 50));
  CHECK(refusal(second, 1));
}

TEST_CASE("a single one is held to its share once another caller lacks room") {
  Uploads uploads(100, "--option");
  Upload large = uploads.begin(kHere), other = uploads.begin(kThere);
  large.take(80);
  CHECK_FALSE(refusal(large, 1));
  other.lacks_room();
  CHECK(refusal(large, 1));
  large = {};
  large = uploads.begin(kHere);
  CHECK_FALSE(refusal(large, 80));
}

TEST_CASE("one that holds no more than its share crowds nobody") {
  Uploads uploads(100, "--option");
  Upload fair = uploads.begin(kHere), other = uploads.begin(kThere);
  fair.take(50);
  other.lacks_room();
  CHECK_FALSE(refusal(fair, 50));
}

TEST_CASE("an empty upload takes nothing") {
  Upload upload;
  CHECK_FALSE(refusal(upload, 100));
  upload.lacks_room();
}
