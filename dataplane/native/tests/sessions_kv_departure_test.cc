#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>

#include "kv_support.h"
#include "sessions/kv_departure.h"

using namespace attnserve;
using namespace attnserve::sessions;
using namespace attnserve::sessions::test;

namespace {

KvConfig config_of(std::size_t max_bytes = 1 << 20) {
  KvConfig config;
  config.max_bytes = max_bytes;
  config.slab_bytes = 4096;
  return config;
}

const SessionSpec kSpec = spec_of({{}, {20, 3, false}});

std::vector<std::uint64_t> numbers(std::size_t count) {
  std::vector<std::uint64_t> made(count);
  std::iota(made.begin(), made.end(), 1);
  return made;
}

// The session that comes of a departure at another store.
SessionState taken(KvSessions& store, KvDeparture& leaving, std::size_t most = 777) {
  const std::string owner(leaving.owner());
  std::optional<KvImport> coming;
  while (!leaving.ended()) {
    const Bytes chunk = leaving.next(most);
    if (!coming) {
      const ExportedSession exported = read_exported(chunk.span());
      coming.emplace(store.import_session(exported, {exported.max_tokens, exported.reserved_tokens},
                                          leaving.lease(), owner, leaving.prefix_hashes()));
    }
    coming->add(chunk.span());
  }
  return coming->finish();
}

bool holds(KvSessions& store, const std::string& id, const std::vector<std::uint64_t>& tokens) {
  const auto step = begin_one(store, id, 1);
  const KvLayer running = store.begin_layer(step, 0);
  bool same = step->lengths()[0] == static_cast<std::int64_t>(tokens.size());
  for (std::size_t at = 0; at < tokens.size(); ++at) {
    same = same && holds_token(step->spec().layout, store.cache().data(),
                               running.sequences()[0].table, at, 0, tokens[at]);
  }
  return same;
}

}  // namespace

TEST_CASE("a session that has moved is the same elsewhere, and its owner is told where") {
  KvSessions store(config_of()), elsewhere(config_of());
  const std::string id =
      store.open(kSpec, std::vector{room_for(300, 100)}, Duration::zero(), {"me", 0, 0, 7})[0].id;
  std::vector<std::uint64_t> held;
  say(store, id, held, numbers(50), true);
  SessionState there;
  {
    auto leaving = store.depart(id);
    REQUIRE(leaving);
    CHECK(leaving->owner() == "me");
    CHECK(leaving->length() == 50);
    CHECK(leaving->prefix_hashes().size() == 3);
    leaving->next(100);  // a try that came to nothing
    leaving->again();
    there = taken(elsewhere, *leaving);
    CHECK(leaving->moved({"b:8001", "b", there.id, 0}) == 7);
  }
  CHECK(there.max_tokens == 300);
  CHECK(there.reserved_tokens == 100);
  CHECK(holds(elsewhere, there.id, held));
  CHECK(store.ids().empty());
  CHECK(store.statistics().pages_promised == 0);
  CHECK(store.moved_to(id, "me")->session_id == there.id);
  CHECK(store.moved_to(id, "me")->length == 50);
  CHECK_FALSE(store.moved_to(id, "you"));
  const auto ask = [&](std::string_view owner) { store.renew(id, Duration::zero(), owner); };
  CHECK_THROWS_AS(ask("me"), SessionMovedError);
  CHECK(refusal([&] { ask("me"); }).code == Code::kUnavailable);
  CHECK(refusal([&] { ask("you"); }).code == Code::kNotFound);
  CHECK_THROWS_AS(begin_one(store, id, 1), SessionMovedError);
  CHECK(refusal([&] { store.depart(id); }).code == Code::kNotFound);
  // Its hashes go on where they ended.
  say(elsewhere, there.id, held, numbers(20), true);
}

TEST_CASE("nothing happens to a session that leaves, until it stays") {
  KvSessions store(config_of());
  const std::string id = open_one(store, kSpec, room_for(100));
  std::vector<std::uint64_t> held;
  say(store, id, held, numbers(40), false);
  {
    const auto leaving = store.depart(id);
    REQUIRE(leaving);
    CHECK(store.leaves(id));
    CHECK_FALSE(store.depart(id));
    CHECK_THROWS_AS(begin_one(store, id, 1), SessionLeavesError);
    CHECK_THROWS_AS(store.truncate(id, 1, "me"), SessionLeavesError);
    CHECK_THROWS_AS(store.fork(id, {}, Duration::zero(), "me"), SessionLeavesError);
    CHECK_THROWS_AS(store.export_session(id, "me"), SessionLeavesError);
    CHECK_THROWS_AS(store.renew(id, Duration::zero(), "me"), SessionLeavesError);
    CHECK_THROWS_AS(store.close(id, "me"), SessionLeavesError);
    CHECK(refusal([&] { store.close(id, "you"); }).code == Code::kNotFound);
  }
  CHECK_FALSE(store.leaves(id));
  say(store, id, held, numbers(3), false);
  CHECK(holds(store, id, held));
}

TEST_CASE("a step that has begun ends first, and a tree is committed; no other step begins") {
  KvSessions store(config_of());
  const std::string id = open_one(store, kSpec, room_for(100));
  const std::vector<std::int32_t> parents{-1, -1};
  const SessionStep tree{id, 2, parents, {}, 0};
  {
    const auto step = store.begin_step(std::span(&tree, 1), "me");
    CHECK_FALSE(store.depart(id));
    CHECK_FALSE(store.leaves(id));
    CHECK(store.renew(id, Duration::zero(), "me").length == 0);
    run_layers(store, step);
  }
  CHECK_FALSE(store.depart(id));
  const std::vector<std::uint32_t> accepted{1};
  CHECK(store.commit(id, accepted, "me").length == 1);
  CHECK(store.leaves(id));
  CHECK_THROWS_AS(begin_one(store, id, 1), SessionLeavesError);
  store.stay(id);
  step_one(store, id, 1);
  CHECK(store.depart(id)->length() == 2);
}

TEST_CASE("a session that leaves is there as long as that takes, and takes no room of others") {
  KvConfig config = config_of(16 * 1024);
  config.default_lease = std::chrono::milliseconds(1);
  KvSessions store(config);
  const NewSession asked = room_for(16);
  std::string id;
  for (;;) {  // until nothing is left to promise
    std::string opened;
    const Status refused = refusal([&] {
      opened = store.open(kSpec, std::span(&asked, 1), std::chrono::hours(1), "me")[0].id;
    });
    if (!refused.ok()) break;
    id = opened;
  }
  auto leaving = store.depart(id);
  REQUIRE(leaving);
  store.tidy();
  while (!leaving->ended()) leaving->next(1000);
  CHECK(store.leaves(id));
}

TEST_CASE("a store that takes no more refuses what would bring sessions, and goes on with others") {
  KvSessions store(config_of());
  const std::string id = open_one(store, kSpec, room_for(100));
  store.take_no_more();
  CHECK(refusal([&] { open_one(store, kSpec, room_for(1)); }).code == Code::kUnavailable);
  CHECK(refusal([&] { store.fork(id, {}, Duration::zero(), "me"); }).code == Code::kUnavailable);
  step_one(store, id, 1);
  CHECK(store.ids() == std::vector{id});
  store.close(id, "me");
  CHECK(store.statistics().pages_promised == 0);
}

TEST_CASE("an import with more hashes than pages is refused") {
  KvSessions store(config_of()), elsewhere(config_of());
  const std::string id = open_one(store, kSpec, room_for(100));
  step_one(store, id, 20);
  auto leaving = store.depart(id);
  REQUIRE(leaving);
  const ExportedSession exported = read_exported(leaving->next(1).span());
  const std::vector<PageHash> hashes(2);
  const Status refused =
      refusal([&] { elsewhere.import_session(exported, {}, Duration::zero(), "me", hashes); });
  CHECK(refused.code == Code::kInvalidArgument);
  CHECK(refused.message == "session.prefix_hashes: given 2; allowed: at most 1, for full pages");
}
