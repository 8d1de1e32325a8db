#include <doctest/doctest.h>

#include <numeric>
#include <thread>

#include "base/text.h"
#include "kv_support.h"

using namespace attnserve;
using namespace attnserve::sessions;
using namespace attnserve::sessions::test;
using namespace std::chrono_literals;

namespace {

const LayerSpec kFull;
constexpr std::size_t kPage = 2048;  // bytes of spec_of's pages

KvConfig config_of(std::size_t pages) {
  KvConfig config;
  config.max_bytes = pages * kPage;
  config.slab_bytes = kPage;
  return config;
}

std::vector<std::uint64_t> tokens_of(std::uint64_t first, std::size_t count) {
  std::vector<std::uint64_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// Whether a layer of a session holds these tokens, those before `from` apart.
bool holds(KvSessions& store, const std::string& id, const std::vector<std::uint64_t>& tokens,
           std::size_t from = 0) {
  const auto step = begin_one(store, id, 1);
  bool same = step->lengths()[0] == static_cast<std::int64_t>(tokens.size());
  for (std::size_t layer = 0; layer < step->spec().layers.size(); ++layer) {
    const KvLayer running = store.begin_layer(step, layer);
    for (std::size_t at = from; at < tokens.size(); ++at) {
      same = same && holds_token(step->spec().layout, store.cache().data(),
                                 running.sequences()[0].table, at, layer, tokens[at]);
    }
  }
  return same;  // the step is abandoned
}

NewSession room_with_prefix(std::uint64_t max_tokens, const std::vector<std::uint64_t>& tokens,
                            std::uint64_t reserved_tokens = 0) {
  return {max_tokens, reserved_tokens, 0, hashes_of(tokens, 16)};
}

}  // namespace

TEST_CASE("a session is opened with an id that nobody guesses, and closed") {
  KvSessions store(config_of(100));
  const std::vector<NewSession> asked = {room_for(100, 20), room_for(30)};
  const std::vector<SessionState> opened =
      store.open(spec_of({kFull, kFull}), asked, Duration::zero(), "me");
  REQUIRE(opened.size() == 2);
  CHECK(opened[0].id.size() == 22);
  CHECK(opened[0].id != opened[1].id);
  CHECK(opened[0].length == 0);
  CHECK(opened[0].max_tokens == 100);
  CHECK(opened[0].reserved_tokens == 20);
  CHECK(opened[1].reserved_tokens == 30);
  CHECK(opened[0].lease == 5min);
  CHECK(store.statistics().pages_promised == 2 * (2 + 2));
  CHECK(store.statistics().pages_in_use == 0);
  store.close(opened[0].id, "me");
  store.close(opened[1].id, "me");
  CHECK(store.statistics().pages_promised == 0);
}

TEST_CASE("what cannot be opened is refused, and nothing of it stays") {
  KvSessions store(config_of(10));
  const auto refused = [&](const SessionSpec& spec, const NewSession& session) {
    const std::vector<NewSession> asked = {room_for(16), session};
    return refusal([&] { store.open(spec, asked, Duration::zero(), "me"); });
  };
  const SessionSpec plain = spec_of({kFull});
  const Status full = refused(plain, room_for(160));
  CHECK(full.code == Code::kResourceExhausted);
  CHECK(full.message ==
        "sessions[1]: 10 pages of 2048 bytes to promise; allowed: 9 that are free, of 10 "
        "(--max-kv-mib)");
  CHECK(full.retry_after > 0s);
  CHECK(refused(plain, room_for(161)).retry_after == 0s);
  CHECK(store.statistics().pages_promised == 0);
  CHECK(store.statistics().sessions == 0);
}

TEST_CASE("a session of another owner is not there") {
  KvSessions store(config_of(10));
  const std::string id = open_one(store, spec_of({kFull}), room_for(16));
  const Status foreign = refusal([&] { store.renew(id, 1s, "you"); });
  CHECK(foreign.code == Code::kNotFound);
  CHECK(foreign.message == refusal([&] { store.renew(id, 1s, "others"); }).message);
  CHECK(refusal([&] { store.close(id, ""); }).code == Code::kNotFound);
  CHECK(refusal([&] { begin_one(store, id, 1, "you"); }).message ==
        "sessions[0].session_id: given '" + id +
            "'; no such session is open: never opened here, closed, or its lease ran out");
  CHECK(refusal([&] { store.close("", "me"); }).message ==
        "session_id: given nothing; allowed: an id that a session was opened with");
  step_one(store, id, 1);
}

TEST_CASE("a step adds its tokens with its last layer, in whatever order they are computed") {
  KvSessions store(config_of(100));
  const std::string id = open_one(store, spec_of({kFull, kFull, kFull}), room_for(100));
  const auto step = begin_one(store, id, 20);
  CHECK(store.statistics().pages_in_use == 0);
  for (const std::size_t layer : {2U, 0U, 1U}) {
    CHECK(store.renew(id, 0s, "me").length == 0);
    KvLayer running = store.begin_layer(step, layer);
    CHECK(running.sequences()[0].length == 20);
    CHECK(running.sequences()[0].table.size() == 2);
    CHECK(running.done() == (layer == 1));
  }
  CHECK(store.renew(id, 0s, "me").length == 20);
  CHECK(store.statistics().pages_in_use == 6);
  CHECK(begin_one(store, id, 5)->lengths()[0] == 20);
}

TEST_CASE("a layer is computed once, and again if that failed") {
  KvSessions store(config_of(100));
  const std::string id = open_one(store, spec_of({kFull, kFull}), room_for(100));
  const auto step = begin_one(store, id, 3);
  {
    const KvLayer failed = store.begin_layer(step, 0);
    CHECK(refusal([&] { store.begin_layer(step, 0); }).code == Code::kInvalidArgument);
    CHECK_FALSE(store.begin_layer(step, 1).done());
  }
  CHECK(store.begin_layer(step, 0).done());
  CHECK(refusal([&] { store.begin_layer(step, 0); }).code == Code::kInvalidArgument);
}

TEST_CASE("a step that is let go leaves its sessions as they were") {
  KvSessions store(config_of(100));
  const std::string id = open_one(store, spec_of({kFull, kFull}), room_for(100));
  std::vector<std::uint64_t> held;
  say(store, id, held, tokens_of(1, 20), false);
  {
    const auto step = begin_one(store, id, 40);
    store.begin_layer(step, 1).done();
    CHECK(store.statistics().pages_in_use == 2 + 4);
    CHECK(refusal([&] { begin_one(store, id, 1); }).code == Code::kFailedPrecondition);
    CHECK(refusal([&] { store.truncate(id, 0, "me"); }).code == Code::kFailedPrecondition);
    CHECK(refusal([&] { store.fork(id, {}, 0s, "me"); }).code == Code::kFailedPrecondition);
    CHECK(refusal([&] { store.export_session(id, "me"); }).code == Code::kFailedPrecondition);
  }
  CHECK(store.statistics().pages_in_use == 4);
  CHECK(holds(store, id, held));
}

TEST_CASE("a step names equal sessions, each once, and what each may take") {
  KvSessions store(config_of(100));
  const std::string first = open_one(store, spec_of({kFull}), room_for(20, 10));
  const std::string second = open_one(store, spec_of({kFull}), room_for(20));
  const std::string other = open_one(store, spec_of({{3, 0, false}}), room_for(20));
  const auto refused = [&](const SessionStep& step) {
    const std::vector<SessionStep> steps = {{first, 1, {}, {}, 0}, step};
    return refusal([&] { store.begin_step(steps, "me"); });
  };
  CHECK(refused({first, 1, {}, {}, 0}).message ==
        "sessions[1].session_id: given '" + first + "'; allowed: each session once in a step");
  CHECK(refused({other, 1, {}, {}, 0}).code == Code::kInvalidArgument);
  CHECK(refused({second, 16, {}, {PageHash{}, PageHash{}}, 0}).message ==
        "sessions[1].prefix_hashes: given 2 hashes; allowed: none, or 1: for pages 0 to 1, which "
        "are full with this step and have none yet");
  CHECK(refused({second, 1, {}, {}, 1}).code == Code::kInvalidArgument);
  const Status beyond = refused({second, 21, {}, {}, 0});
  CHECK(beyond.code == Code::kResourceExhausted);
  CHECK(beyond.message ==
        "sessions[1].new_tokens: given 21 after 0 that are there; allowed: 20 together "
        "(max_tokens)");
  CHECK(refused({second, 20, {}, {}, 0}).ok());
}

TEST_CASE("what is promised can be had, however full the store is; beyond it a step asks") {
  KvSessions store(config_of(8));
  const std::string id = open_one(store, spec_of({kFull}), room_for(128, 64));
  const std::string other = open_one(store, spec_of({kFull}), room_for(64));
  CHECK(refusal([&] { open_one(store, spec_of({kFull}), room_for(1)); }).code ==
        Code::kResourceExhausted);
  step_one(store, id, 64);
  step_one(store, other, 64);
  const Status full = refusal([&] { step_one(store, id, 1); });
  CHECK(full.code == Code::kResourceExhausted);
  CHECK(full.message.starts_with("sessions: 1 pages of 2048 bytes to promise; allowed: 0"));
  store.close(other, "me");
  step_one(store, id, 64);
  CHECK(store.renew(id, 0s, "me").length == 128);
}

TEST_CASE("a fork shares full pages, and copies the last one when either writes") {
  KvSessions store(config_of(100));
  const std::string id = open_one(store, spec_of({kFull, kFull}), room_for(100));
  std::vector<std::uint64_t> held;
  say(store, id, held, tokens_of(1, 40), false);
  const SessionState forked = store.fork(id, {50, 48}, 0s, "me");
  CHECK(forked.length == 40);
  CHECK(forked.max_tokens == 50);
  CHECK(forked.reserved_tokens == 48);
  CHECK(store.statistics().pages_in_use == 6);
  // 7 pages a layer for the one; of the other's 3, 2 are the same.
  CHECK(store.statistics().pages_promised == 2 * (7 + 1));
  std::vector<std::uint64_t> other = held;
  say(store, forked.id, other, tokens_of(1000, 5), false);
  CHECK(store.statistics().pages_in_use == 8);
  say(store, id, held, tokens_of(2000, 5), false);
  CHECK(store.statistics().pages_in_use == 8);
  CHECK(holds(store, id, held));
  CHECK(holds(store, forked.id, other));
  CHECK(store.fork(id, 7, {}, 0s, "me").length == 7);
  CHECK(refusal([&] { store.fork(id, 46, {}, 0s, "me"); }).code == Code::kInvalidArgument);
  CHECK(refusal([&] { store.fork(id, {44, 0}, 0s, "me"); }).code == Code::kInvalidArgument);
  store.close(id, "me");
  CHECK(holds(store, forked.id, other));
}

TEST_CASE("a truncated session goes on from there; what is shared stays as it was") {
  KvSessions store(config_of(6));
  const std::string id = open_one(store, spec_of({kFull}), room_for(64));
  std::vector<std::uint64_t> held;
  say(store, id, held, tokens_of(1, 60), false);
  CHECK(store.truncate(id, 40, "me").length == 40);
  CHECK(store.statistics().pages_in_use == 3);
  held.resize(40);
  say(store, id, held, tokens_of(100, 10), false);
  CHECK(holds(store, id, held));

  const std::string forked = store.fork(id, {64, 0}, 0s, "me").id;  // 3 pages are common
  std::vector<std::uint64_t> other = held;
  CHECK(store.statistics().pages_promised == 5);
  const std::string rest = open_one(store, spec_of({kFull}), room_for(16));
  const Status full = refusal([&] { store.truncate(forked, 20, "me"); });
  CHECK(full.code == Code::kResourceExhausted);
  CHECK(holds(store, forked, other));
  store.close(rest, "me");
  store.truncate(forked, 33, "me");
  other.resize(33);
  say(store, forked, other, tokens_of(200, 10), false);
  CHECK(holds(store, forked, other));
  CHECK(holds(store, id, held));
  store.close(id, "me");
  store.truncate(forked, 0, "me");
  CHECK(store.statistics().pages_in_use == 0);
  CHECK(store.statistics().pages_promised == 4);
}

TEST_CASE("queries alone see what is there and add nothing, of a fork too") {
  KvSessions store(config_of(100));
  const SessionSpec spec = spec_of({kFull, kFull});
  const std::string id = open_one(store, spec, room_for(20));
  const auto asked = [](const std::string& of, std::uint64_t queries) {
    return SessionStep{of, queries, {}, {}, 0};
  };
  const SessionStep empty = asked(id, 1);
  CHECK(refusal([&] { store.begin_step(std::span(&empty, 1), "me", true); }).message ==
        "sessions[0].session_id: given " + quoted(id) +
            "; allowed: with queries_only: a session that holds tokens");
  std::vector<std::uint64_t> held;
  say(store, id, held, tokens_of(1, 13), false);
  const std::string forked = store.fork(id, 9, {20, 0}, 0s, "me").id;
  for (const auto& [of, length] : {std::pair{id, 13}, std::pair{forked, 9}}) {
    // More queries than there is room for tokens.
    const SessionStep reads = asked(of, 30);
    const auto step = store.begin_step(std::span(&reads, 1), "me", true);
    CHECK(step->starts()[1] == 30);
    CHECK(step->key_starts(1)[1] == 0);
    CHECK(step->keys()[0] == length);
    for (std::size_t layer = 0; layer < 2; ++layer) {
      KvLayer running = store.begin_layer(step, layer);
      const LayerSequence& sequence = running.sequences()[0];
      CHECK(sequence.length == length);
      CHECK(sequence.table.size() * store.config().page_tokens >= sequence.length);
      CHECK(running.done() == (layer == 1));
    }
    CHECK(store.renew(of, 0s, "me").length == static_cast<std::uint64_t>(length));
    step_one(store, of, 2);
  }
}

TEST_CASE("of a tree one path is kept") {
  KvSessions store(config_of(100));
  SessionSpec spec = spec_of({kFull, {5, 2, false}}, CacheType::kInt8);
  const std::string id = open_one(store, spec, room_for(100));
  std::vector<std::uint64_t> held;
  say(store, id, held, tokens_of(1, 13), false);
  const std::vector<std::int32_t> parents = {-1, 0, -1, 2, 3, 3};
  const SessionStep asked{id, 6, parents, {}, 0};
  const auto step = store.begin_step(std::span(&asked, 1), "me");
  CHECK(std::vector(step->parents().begin(), step->parents().end()) ==
        std::vector<std::int64_t>(parents.begin(), parents.end()));
  for (std::size_t layer = 0; layer < 2; ++layer) {
    KvLayer running = store.begin_layer(step, layer);
    for (std::size_t at = 0; at < 6; ++at) {
      write_token(spec.layout, store.cache().data(), running.sequences()[0].table, 13 + at, layer,
                  500 + at);
    }
    running.done();
  }
  CHECK(store.renew(id, 0s, "me").length == 13);
  CHECK(refusal([&] { begin_one(store, id, 1); }).code == Code::kFailedPrecondition);
  CHECK(refusal([&] { store.truncate(id, 3, "me"); }).code == Code::kFailedPrecondition);
  const auto refused = [&](std::vector<std::uint32_t> accepted) {
    return refusal([&] { store.commit(id, accepted, "me"); }).message;
  };
  CHECK(refused({6}) == "accepted[0]: given 6; allowed: an index among the last step's 6 tokens");
  CHECK(refused({1}) ==
        "accepted[0]: given 1, whose parent is 0; allowed: a token whose parent is -1: each the "
        "parent of the next");
  CHECK(refused({2, 4}).starts_with("accepted[1]: given 4, whose parent is 3"));
  const std::vector<std::uint32_t> path = {2, 3, 5};
  CHECK(store.commit(id, path, "me").length == 16);
  held.insert(held.end(), {502, 503, 505});
  CHECK(holds(store, id, held));
  CHECK(store.statistics().pages_in_use == 2);
  CHECK(refusal([&] { store.commit(id, path, "me"); }).code == Code::kFailedPrecondition);
}

TEST_CASE("a window gives back what no query sees, but its first keys and what may be truncated") {
  KvSessions store(config_of(200));
  // The last 20 keys, and the first 3.
  const std::string id = open_one(store, spec_of({{20, 3, false}}), room_for(1000, 1000));
  // One page kept, 20 + 64 + 512 tokens and a page more, wherever they begin.
  CHECK(store.statistics().pages_promised == 1 + 38 + 1);
  std::vector<std::uint64_t> held;
  for (int step = 0; step < 40; ++step) {
    say(store, id, held, tokens_of(1 + held.size(), 10), false);
  }
  // From 400 - 20 - 64 on.
  CHECK(store.statistics().pages_in_use == 1 + 25 - 316 / 16);
  CHECK(holds(store, id, held, 316));
  CHECK(store.truncate(id, 336, "me").length == 336);
  held.resize(336);
  CHECK(holds(store, id, held, 316));
  const Status far = refusal([&] { store.truncate(id, 200, "me"); });
  CHECK(far.code == Code::kFailedPrecondition);
  CHECK(far.message ==
        "length: given 200, for which a window lacks keys that were given back; allowed: the last "
        "64 of 336 may always be truncated");
  CHECK(store.truncate(id, 10, "me").length == 10);  // these were kept
  held.resize(10);
  CHECK(holds(store, id, held));
}

TEST_CASE("a step of a window that is longer than what is promised asks, and is refused alone") {
  KvConfig config = config_of(12);
  config.promised_step = 16;
  KvSessions store(config);
  const std::string id = open_one(store, spec_of({{16, 0, false}}), room_for(1000));
  CHECK(store.statistics().pages_promised == 7);
  CHECK(refusal([&] { step_one(store, id, 300); }).code == Code::kResourceExhausted);
  for (int step = 0; step < 30; ++step) step_one(store, id, 16);
  CHECK(store.renew(id, 0s, "me").length == 480);
  step_one(store, id, 80);
}

TEST_CASE("keys of cross layers are written by the first step, then there") {
  KvSessions store(config_of(100));
  const SessionSpec spec = spec_of({kFull, {-1, 0, true}});
  const std::string id = open_one(store, spec, {64, 0, 40, {}});
  CHECK(store.statistics().pages_promised == 4 + 3);
  CHECK(refusal([&] { begin_one(store, id, 1); }).message ==
        "sessions[0].cross_tokens: given 0; allowed: 1 to 40 in the session's first step");
  const SessionStep asked{id, 2, {}, {}, 18};
  store.begin_layer(store.begin_step(std::span(&asked, 1), "me"), 1).done();  // and let go
  CHECK(store.statistics().pages_in_use == 0);
  const auto step = store.begin_step(std::span(&asked, 1), "me");
  CHECK(step->key_starts(0)[1] == 2);
  CHECK(step->key_starts(1)[1] == 18);
  store.begin_layer(step, 0).done();
  KvLayer running = store.begin_layer(step, 1);
  CHECK(running.sequences()[0].length == 18);
  for (std::size_t at = 0; at < 18; ++at) {
    write_token(spec.layout, store.cache().data(), running.sequences()[0].table, at, 1, 70 + at);
  }
  CHECK(running.done());
  CHECK(store.statistics().pages_promised == 4 + 2);
  CHECK(refusal([&] { store.begin_step(std::span(&asked, 1), "me"); }).code ==
        Code::kInvalidArgument);

  const std::string forked = store.fork(id, 0, {}, 0s, "me").id;
  CHECK(store.statistics().pages_promised == 4 + 2 + 4);
  store.close(id, "me");
  const auto next = begin_one(store, forked, 1);
  const KvLayer again = store.begin_layer(next, 1);
  CHECK(again.sequences()[0].length == 18);
  CHECK(next->key_starts(1)[1] == 0);
  CHECK(holds_token(spec.layout, store.cache().data(), again.sequences()[0].table, 17, 1, 87));
}

TEST_CASE("a session begins with the prefix that another one published") {
  KvSessions store(config_of(100));
  const SessionSpec spec = spec_of({kFull, kFull});
  const std::string id = open_one(store, spec, room_for(100));
  std::vector<std::uint64_t> held;
  say(store, id, held, tokens_of(1, 30), true);
  say(store, id, held, tokens_of(31, 30), true);

  std::vector<std::uint64_t> asked = tokens_of(1, 60);
  const auto found = [&](std::string_view owner, const SessionSpec& of) {
    const NewSession session = room_with_prefix(100, asked);
    const SessionState state =
        store.open(of, std::span(&session, 1), Duration::zero(), owner).front();
    if (state.length > 0) {
      CHECK(holds(store, state.id, {asked.begin(), asked.begin() + state.length}));
    }
    store.close(state.id, owner);
    return state.length;
  };
  CHECK(found("me", spec) == 48);
  CHECK(found("you", spec) == 0);
  CHECK(found("me", spec_of({kFull, kFull}, CacheType::kFp16)) == 0);
  CHECK(found("me", spec_of({kFull})) == 0);
  SessionSpec of_layers = spec;
  of_layers.layer_models = {{"core", "1"}, {"core", "1"}};
  CHECK(found("me", of_layers) == 0);
  CHECK(store.statistics().prefix_pages_found == 3);
  CHECK(store.statistics().prefix_pages_asked == 15);

  store.close(id, "me");
  CHECK(store.statistics().pages_in_use == 0);
  CHECK(store.statistics().pages_cached == 6);
  CHECK(found("me", spec) == 48);
  asked[20] = 7;  // the second page is another one
  CHECK(found("me", spec) == 16);
  store.drop_cached();
  CHECK(found("me", spec) == 0);
}

TEST_CASE("a prefix that many sessions share is stored and promised once") {
  KvSessions store(config_of(128 + 64));
  const SessionSpec spec = spec_of({kFull});
  const std::vector<std::uint64_t> prefix = tokens_of(1, 2048);
  std::vector<std::uint64_t> held;
  const std::string id = open_one(store, spec, room_for(2048));
  say(store, id, held, prefix, true);
  for (int count = 0; count < 32; ++count) {
    const std::string other = open_one(store, spec, room_with_prefix(2080, prefix, 2064));
    held = prefix;
    say(store, other, held, tokens_of(9000 + count, 16), true);
    CHECK(holds(store, other, held));
  }
  CHECK(store.statistics().pages_in_use == 128 + 32);
}

TEST_CASE("a prefix is found where a window is, if what it sees is there") {
  KvSessions store(config_of(400));
  const SessionSpec spec = spec_of({kFull, {20, 3, false}});
  const std::string id = open_one(store, spec, room_for(400));
  std::vector<std::uint64_t> held;
  for (int step = 0; step < 12; ++step) {
    say(store, id, held, tokens_of(1 + held.size(), 16), true);
  }
  CHECK(store.statistics().pages_cached > 0);
  const std::string whole = open_one(store, spec, room_with_prefix(400, held));
  CHECK(holds(store, whole, held, 192 - 20));
  const std::string half =
      open_one(store, spec, room_with_prefix(400, {held.begin(), held.begin() + 96}));
  CHECK(holds(store, half, {held.begin(), held.begin() + 96}, 96 - 20));
  store.close(half, "me");
  store.close(whole, "me");
  store.drop_cached();  // what the first session has given back
  CHECK(store
            .renew(open_one(store, spec, room_with_prefix(400, {held.begin(), held.begin() + 96})),
                   0s, "me")
            .length == 16);  // a query there sees no further than the first keys
  CHECK(store.renew(open_one(store, spec, room_with_prefix(400, held)), 0s, "me").length == 192);
}

TEST_CASE("hashes may come later, of all pages that have none") {
  KvSessions store(config_of(100));
  const std::string id = open_one(store, spec_of({kFull}), room_for(400));
  std::vector<std::uint64_t> held;
  say(store, id, held, tokens_of(1, 40), false);
  held.push_back(41);
  const SessionStep asked{id, 1, {}, hashes_of(held, 16), 0};
  run_layers(store, store.begin_step(std::span(&asked, 1), "me"));
  const std::string other = open_one(store, spec_of({kFull}), room_with_prefix(100, held));
  held.resize(32);
  CHECK(holds(store, other, held));
}

TEST_CASE("cached pages go, the one that was left longest ago first, when room is needed") {
  KvSessions store(config_of(8));
  const SessionSpec spec = spec_of({kFull});
  std::vector<std::uint64_t> first, second;
  std::string id = open_one(store, spec, room_for(64));
  say(store, id, first, tokens_of(1, 64), true);
  store.close(id, "me");
  id = open_one(store, spec, room_for(48));
  say(store, id, second, tokens_of(101, 48), true);
  store.close(id, "me");
  CHECK(store.statistics().pages_cached == 7);
  id = open_one(store, spec, room_for(64));
  step_one(store, id, 64);  // one page is free; three of the first go, its deepest first
  store.close(id, "me");
  CHECK(store.statistics().evicted_pages == 3);
  CHECK(store.renew(open_one(store, spec, room_with_prefix(64, first)), 0s, "me").length == 16);
  CHECK(store.renew(open_one(store, spec, room_with_prefix(48, second)), 0s, "me").length == 48);
}

TEST_CASE("idle sessions expire, with the pages that they hold and are promised") {
  KvSessions store(config_of(100));
  const std::string id = open_one(store, spec_of({kFull}), room_for(100));
  const std::string other = open_one(store, spec_of({kFull}), room_for(100));
  step_one(store, id, 20);
  auto step = begin_one(store, id, 20);
  store.begin_layer(step, 0).done();
  step = begin_one(store, id, 20);
  CHECK(store.renew(id, 1us, "me").lease == 1us);
  CHECK(store.renew(other, 1000h, "me").lease == 1h);
  std::this_thread::sleep_for(5us);
  store.tidy();
  CHECK(store.statistics().expired == 1);
  CHECK(store.statistics().pages_promised == 7);
  CHECK(refusal([&] { store.begin_layer(step, 0); }).code == Code::kNotFound);
  step.reset();
  CHECK(refusal([&] { store.renew(id, 0s, "me"); }).code == Code::kNotFound);
  CHECK(store.statistics().pages_in_use == 0);
}

TEST_CASE("pages of a session that is closed while a layer is computed are its until then") {
  KvSessions store(config_of(100));
  const std::string id = open_one(store, spec_of({kFull}), room_for(100));
  const std::string other = open_one(store, spec_of({kFull}), room_for(100));
  const std::vector<SessionStep> asked = {{id, 16, {}, {}, 0}, {other, 16, {}, {}, 0}};
  const auto step = store.begin_step(asked, "me");
  KvLayer running = store.begin_layer(step, 0);
  store.close(id, "me");
  CHECK(store.statistics().pages_in_use == 2);
  CHECK(running.done());
  CHECK(store.statistics().pages_in_use == 1);
  CHECK(store.renew(other, 0s, "me").length == 16);
}

TEST_CASE("an owner has as many sessions as it may have, whichever way they come") {
  KvSessions store(config_of(100));
  const SessionOwner me("me", 2);
  const auto open = [&](const SessionOwner& owner, std::size_t count) {
    const std::vector<NewSession> asked(count, room_for(16));
    return store.open(spec_of({kFull}), asked, Duration::zero(), owner);
  };
  const auto refused = [&](std::size_t count) { return refusal([&] { open(me, count); }); };
  CHECK(refused(3).code == Code::kResourceExhausted);
  CHECK(refused(3).retry_after.count() == 0);  // never
  CHECK(store.statistics().pages_promised == 0);
  const std::string first = open(me, 1).front().id;
  const std::string second = open(me, 1).front().id;
  CHECK(refused(1).message.find("--caller-sessions") != std::string::npos);
  CHECK(refused(1).retry_after.count() > 0);
  CHECK(refusal([&] { store.fork(first, Growth{16, 0}, Duration::zero(), me); }).code ==
        Code::kResourceExhausted);
  open("another", 3);  // whom it does not concern
  store.close(first, "me");
  const std::string third = store.fork(second, Growth{16, 0}, Duration::zero(), me).id;
  CHECK(refused(1).code == Code::kResourceExhausted);
  store.close(second, "me");
  store.close(third, "me");
  CHECK(open(me, 2).size() == 2);
}

TEST_CASE("sessions that expired are an owner's no longer") {
  KvSessions store(config_of(100));
  const SessionOwner me("me", 1);
  const std::vector<NewSession> asked = {room_for(16)};
  const std::string id = store.open(spec_of({kFull}), asked, 1h, me).front().id;
  CHECK_THROWS_AS(store.open(spec_of({kFull}), asked, 1h, me), RequestError);
  store.renew(id, 1us, "me");
  std::this_thread::sleep_for(5us);
  CHECK(store.open(spec_of({kFull}), asked, 1h, me).size() == 1);
}

TEST_CASE("an owner is promised as many bytes as it may have, whichever way they come") {
  KvSessions store(config_of(100));
  const SessionSpec spec = spec_of({kFull});
  const std::size_t page = spec.layout.page_bytes();
  const SessionOwner me("me", 0, 10 * page);
  const auto open = [&](std::uint64_t tokens, std::uint64_t reserved, const SessionOwner& owner) {
    const NewSession asked = room_for(tokens, reserved);
    return store.open(spec, std::span(&asked, 1), Duration::zero(), owner).front().id;
  };
  const Status never = refusal([&] { open(16 * 11, 0, me); });
  CHECK(never.code == Code::kResourceExhausted);
  CHECK(never.retry_after.count() == 0);
  CHECK(never.message == text("sessions[0]: ", 11 * page, " bytes of all sessions of this caller, ",
                              "with ", 11 * page, " more; allowed: ", 10 * page,
                              " (--caller-kv-mib)"));
  CHECK(promised_to(store, "me") == 0);
  const std::string id = open(16 * 20, 16 * 6, me);
  const Status full = refusal([&] { open(16 * 5, 0, me); });
  CHECK(full.code == Code::kResourceExhausted);
  CHECK(full.retry_after.count() > 0);
  open(16 * 80, 0, "another");  // whom it does not concern
  CHECK(promised_to(store, "me") == 6 * page);

  // Growth counts, and a step that is refused leaves its session as it was.
  std::vector<std::uint64_t> held;
  const auto grow = [&](const SessionOwner& owner, std::uint64_t tokens) {
    const SessionStep step{id, tokens, {}, {}, 0};
    run_layers(store, store.begin_step(std::span(&step, 1), owner));
  };
  say(store, id, held, tokens_of(1, 16 * 6), false);
  grow(me, 16 * 4);
  const Status more = refusal([&] { grow(me, 1); });
  CHECK(more.code == Code::kResourceExhausted);
  CHECK(more.message.starts_with(text("sessions: ", 11 * page, " bytes of all sessions")));
  CHECK(promised_to(store, "me") == 10 * page);
  CHECK(store.truncate(id, 16 * 6, me).length == 16 * 6);
  CHECK(holds(store, id, held));
  CHECK(promised_to(store, "me") == 6 * page);

  // A fork shares: what is common counts once.
  const std::string forked = store.fork(id, {16 * 9, 16 * 9}, Duration::zero(), me).id;
  CHECK(promised_to(store, "me") == 9 * page);
  CHECK(refusal([&] { store.fork(id, {16 * 9, 16 * 9}, Duration::zero(), me); }).code ==
        Code::kResourceExhausted);
  // Truncated, it would need pages of its own.
  CHECK(refusal([&] { store.truncate(forked, 0, me); }).code == Code::kResourceExhausted);
  CHECK(promised_to(store, "me") == 9 * page);
  store.close(id, "me");
  CHECK(promised_to(store, "me") == 9 * page);
  store.close(forked, "me");
  CHECK(promised_to(store, "me") == 0);
}

TEST_CASE("cached pages are nobody's until they are found again; then they count") {
  KvSessions store(config_of(100));
  const SessionSpec spec = spec_of({kFull});
  const std::size_t page = spec.layout.page_bytes();
  std::vector<std::uint64_t> held;
  const std::string id = open_one(store, spec, room_for(64));
  say(store, id, held, tokens_of(1, 48), true);
  CHECK(promised_to(store, "me") == 4 * page);
  store.close(id, "me");
  store.tidy();  // forgets owners without anything, not this one
  CHECK(promised_to(store, "me") == 0);
  NewSession again = room_for(64);
  again.prefix_hashes = hashes_of(held, 16);
  const auto open = [&](std::size_t pages) {
    const SessionOwner owner("me", 0, pages * page);
    return store.open(spec, std::span(&again, 1), Duration::zero(), owner).front();
  };
  CHECK(refusal([&] { open(3); }).code == Code::kResourceExhausted);
  CHECK(promised_to(store, "me") == 0);
  CHECK(open(4).length == 48);
  CHECK(promised_to(store, "me") == 4 * page);
}
