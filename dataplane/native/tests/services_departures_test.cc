#include <doctest/doctest.h>

#include "services/departures.h"
#include "services/stream_state.h"
#include "services_support.h"

namespace attnserve::services {
namespace {

struct It {
  Core core{options()};
  std::shared_ptr<NotedCall> call = std::make_shared<NotedCall>();
  std::shared_ptr<StreamState> stream = StreamState::open(core, call, "Decode", true);

  static CoreOptions options() {
    CoreOptions made;
    made.kv.max_bytes = 1 << 20;
    made.limits.chunk_bytes = 1000;
    return made;
  }
  std::string open() {
    const sessions::SessionSpec spec{
        "core", "1", {1, 8, 8, sessions::CacheType::kFp32, 16, false}, {{}}, {}};
    const sessions::NewSession asked{64, 0, 0, {}};
    return core.kv
        .open(spec, std::span(&asked, 1), Duration::zero(), {"me", 0, 0, stream->number()})[0]
        .id;
  }
};

}  // namespace

TEST_CASE("a session that has moved is told of on its stream, and to who waits for it") {
  It it;
  const std::string id = it.open();
  int told = 0;
  {
    const auto leaving = Departure::begin(it.core, id);
    REQUIRE(leaving);
    it.core.departures.wait(id, [&] { ++told; });
    it.core.departures.wait("another", [&] { told += 100; });
    while (!leaving->ended()) CHECK_FALSE(leaving->next().empty());
    CHECK(told == 0);
    leaving->moved("b:8001", "", "there");
    CHECK(told == 1);
  }
  CHECK(told == 1);
  REQUIRE(it.call->sent().size() == 1);
  CHECK(it.call->sent()[0].find("b:8001") != std::string::npos);
  CHECK(it.core.kv.moved_to(id, "me")->session_id == "there");
}

TEST_CASE("who waits for a session that stays is told, too") {
  It it;
  const std::string id = it.open();
  int told = 0;
  const auto count = [&] { ++told; };
  {
    const auto leaving = Departure::begin(it.core, id);
    it.core.departures.wait(id, count);
  }
  CHECK(told == 1);
  CHECK(it.call->sent().empty());
  it.core.departures.wait(id, count);
  Departure::give_up(it.core, id);
  CHECK(told == 2);
  CHECK_FALSE(it.core.kv.leaves(id));
}

TEST_CASE("streams with sessions go on while those are moved, others do not") {
  It it;
  const auto other = std::make_shared<NotedCall>();
  const auto stream = StreamState::open(it.core, other, "AttendStream");
  it.core.streams.drain_without_sessions();
  CHECK(other->finished());
  CHECK_FALSE(it.call->finished());
  const auto late = std::make_shared<NotedCall>(), later = std::make_shared<NotedCall>();
  StreamState::open(it.core, late, "AttendStream");
  CHECK(late->finished());
  const auto open = StreamState::open(it.core, later, "Decode", true);
  CHECK_FALSE(later->finished());
  it.core.streams.drain();
  CHECK(it.call->finished());
  CHECK(later->finished());
  it.core.streams.tell(it.stream->number(), bytes_of("nobody hears this"));
  CHECK(it.call->sent().empty());
}

}  // namespace attnserve::services
