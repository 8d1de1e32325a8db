#include <doctest/doctest.h>

#include <limits>
#include <numeric>

#include "kv_support.h"
#include "sessions/kv_chunk.h"

using namespace attnserve;
using namespace attnserve::sessions;
using namespace attnserve::sessions::test;
using namespace std::chrono_literals;

namespace {

KvConfig config_of(std::size_t max_bytes) {
  KvConfig config;
  config.max_bytes = max_bytes;
  config.slab_bytes = 4096;
  return config;
}

SessionSpec spec_with_window(bool latent = false) {
  return spec_of({{}, {20, 3, false}}, CacheType::kInt8, 12, latent);
}

std::string filled(KvSessions& store, std::vector<std::uint64_t>& held, std::size_t tokens,
                   bool latent = false) {
  const std::string id = open_one(store, spec_with_window(latent), room_for(300));
  while (held.size() < tokens) {
    std::vector<std::uint64_t> more(std::min<std::size_t>(25, tokens - held.size()));
    std::iota(more.begin(), more.end(), held.size() + 1);
    say(store, id, held, more, false);
  }
  return id;
}

std::vector<std::string> chunks_of(KvExport from, std::size_t most) {
  std::vector<std::string> chunks;
  while (!from.ended()) {
    const Bytes chunk = from.next(most);
    chunks.emplace_back(reinterpret_cast<const char*>(chunk.data()), chunk.size());
  }
  CHECK(from.next(most).empty());
  return chunks;
}

ByteSpan bytes_of(const std::string& chunk) { return std::as_bytes(std::span(chunk)); }

SessionState imported(KvSessions& store, const std::vector<std::string>& chunks,
                      Growth growth = {}) {
  KvImport to =
      store.import_session(read_exported(bytes_of(chunks.at(0))), growth, Duration::zero(), "you");
  for (const std::string& chunk : chunks) to.add(bytes_of(chunk));
  return to.finish();
}

bool holds(KvSessions& store, const std::string& id, const std::vector<std::uint64_t>& tokens,
           std::size_t seen_from) {
  const auto step = begin_one(store, id, 1, "you");
  bool same = step->lengths()[0] == static_cast<std::int64_t>(tokens.size());
  for (std::size_t layer = 0; layer < 2; ++layer) {
    const KvLayer running = store.begin_layer(step, layer);
    for (std::size_t at = layer == 0 ? 0 : seen_from; at < tokens.size(); ++at) {
      same = same && holds_token(step->spec().layout, store.cache().data(),
                                 running.sequences()[0].table, at, layer, tokens[at]);
    }
  }
  return same;
}

}  // namespace

TEST_CASE("an exported session is the same elsewhere") {
  KvSessions store(config_of(1 << 20)), elsewhere(config_of(1 << 20));
  for (const std::size_t length : {0U, 5U, 16U, 150U, 288U}) {
    std::vector<std::uint64_t> held;
    const std::string id = filled(store, held, length);
    for (const std::size_t most : {1U, 1000U, 1U << 20}) {
      CAPTURE(length);
      CAPTURE(most);
      if (most == 1 && length > 20) continue;  // a byte a chunk
      const std::vector<std::string> chunks = chunks_of(store.export_session(id, "me"), most);
      const SessionState state = imported(elsewhere, chunks);
      CHECK(state.length == length);
      CHECK(state.max_tokens == 300);
      CHECK(state.reserved_tokens == 300);
      CHECK(holds(elsewhere, state.id, held, length > 20 ? length - 20 : 0));
      elsewhere.close(state.id, "you");
    }
    store.close(id, "me");
  }
  CHECK(store.statistics().pages_in_use == 0);
  CHECK(elsewhere.statistics().pages_in_use == 0);
  CHECK(elsewhere.statistics().pages_promised == 0);
}

TEST_CASE("an export of latent layers is smaller, and says that they are") {
  KvSessions store(config_of(1 << 20));
  std::vector<std::uint64_t> held, plain;
  const auto size_of = [](const std::vector<std::string>& chunks) {
    std::size_t sum = 0;
    for (const std::string& chunk : chunks) sum += chunk.size();
    return sum;
  };
  const std::vector<std::string> chunks =
      chunks_of(store.export_session(filled(store, held, 150, true), "me"), 1000);
  const std::vector<std::string> others =
      chunks_of(store.export_session(filled(store, plain, 150), "me"), 1000);
  CHECK(size_of(chunks) < size_of(others) * 0.6);
  CHECK(read_exported(bytes_of(chunks[0])).spec == spec_with_window(true));
  CHECK(holds(store, imported(store, chunks).id, held, 130));
}

TEST_CASE("an export says what the session is; an import may leave it other room") {
  KvSessions store(config_of(1 << 20));
  std::vector<std::uint64_t> held;
  const std::vector<std::string> chunks =
      chunks_of(store.export_session(filled(store, held, 150), "me"), 4000);
  const ExportedSession read = read_exported(bytes_of(chunks[0]));
  CHECK(read.spec == spec_with_window());
  CHECK(read.length == 150);
  CHECK(read.max_tokens == 300);
  CHECK(read.first_pages == std::vector<std::uint32_t>{0, (150 - 84) / 16});
  const SessionState state = imported(store, chunks, {200, 160});
  CHECK(state.max_tokens == 200);
  CHECK(state.reserved_tokens == 160);
  CHECK(refusal([&] { imported(store, chunks, {149, 0}); }).code == Code::kInvalidArgument);
}

TEST_CASE("an export names the model of each layer") {
  KvSessions store(config_of(1 << 20));
  SessionSpec spec = spec_of({{}, {20, 3, false}});
  spec.model = spec.version = "";
  spec.layer_models = {{"first", "1"}, {"second", "12"}};
  const std::string id = open_one(store, spec, room_for(100));
  const auto step = begin_one(store, id, 20);
  run_layers(store, step);
  const std::vector<std::string> chunks = chunks_of(store.export_session(id, "me"), 4000);
  CHECK(read_exported(bytes_of(chunks[0])).spec == spec);
  CHECK(imported(store, chunks).length == 20);
}

TEST_CASE("an export is what the session was then, while it goes on") {
  KvSessions store(config_of(1 << 20));
  std::vector<std::uint64_t> held;
  const std::string id = filled(store, held, 150);
  KvExport from = store.export_session(id, "me");
  const std::vector<std::uint64_t> then = held;
  store.truncate(id, 145, "me");
  held.resize(145);
  say(store, id, held, std::vector<std::uint64_t>(100, 7), false);
  store.close(id, "me");
  const SessionState state = imported(store, chunks_of(std::move(from), 1000));
  CHECK(holds(store, state.id, then, 130));
}

TEST_CASE("an export keeps nothing of others that used its pages before") {
  KvSessions store(config_of(64 << 10));
  std::vector<std::uint64_t> secret;
  store.close(filled(store, secret, 200), "me");
  std::vector<std::uint64_t> held;
  const std::vector<std::string> chunks =
      chunks_of(store.export_session(filled(store, held, 1), "me"), 1 << 20);
  const PageLayout layout = spec_with_window().layout;
  const std::string& pages = chunks.at(1);
  REQUIRE(pages.size() == 64 + 2 * layout.page_bytes());
  std::vector<bool> held_here(layout.page_bytes(), false);
  each_row(layout, 0, 0, 1, [&](std::size_t at, std::size_t bytes, std::uint64_t) {
    std::fill_n(held_here.begin() + static_cast<std::ptrdiff_t>(at), bytes, true);
  });
  for (std::size_t at = 0; at < layout.page_bytes(); ++at) {
    if (!held_here[at]) REQUIRE(pages[64 + at] == 0);
  }
}

TEST_CASE("chunks that were changed, left out, mixed or of another format are refused") {
  KvSessions store(config_of(1 << 20));
  std::vector<std::uint64_t> held;
  const std::string id = filled(store, held, 150);
  const std::vector<std::string> chunks = chunks_of(store.export_session(id, "me"), 2000);
  const std::vector<std::string> others = chunks_of(store.export_session(id, "me"), 2000);
  REQUIRE(chunks.size() > 3);
  const auto refused = [&](auto&& change) {
    std::vector<std::string> changed = chunks;
    change(changed);
    const Status status = refusal([&] { imported(store, changed); });
    CHECK(store.statistics().sessions == 1);
    return status;
  };
  for (std::size_t at = 0; at < 64; ++at) {
    const Status status = refused([&](auto& of) { of[1][at] ^= 4; });
    CHECK(status.code == (at >= 8 && at < 12 ? Code::kFailedPrecondition : Code::kDataLoss));
  }
  for (const std::size_t at : {64U, 500U, 1999U}) {
    CHECK(refused([&](auto& of) { of[1][at] ^= 1; }).message ==
          "chunk: its checksum does not match: it was changed");
  }
  CHECK(refused([](auto& of) { of[0][70] ^= 1; }).code == Code::kDataLoss);
  CHECK(refused([](auto& of) { of.erase(of.begin() + 1); }).message ==
        "chunk: given index 2; allowed: the next one, 1");
  CHECK(refused([](auto& of) { of.pop_back(); }).message == "chunk: the last ones are missing");
  CHECK(refused([](auto& of) { of.push_back(of.back()); }).message ==
        "chunk: it comes after the last one");
  CHECK(refused([&](auto& of) { of[2] = others[2]; }).message ==
        "chunk: it is of another export than those before it");
  CHECK(refused([](auto& of) { of[1].resize(63); }).code == Code::kDataLoss);
  CHECK(refused([](auto& of) { of[1].resize(100); }).code == Code::kDataLoss);
  CHECK(refused([](auto& of) { std::swap(of[0], of[1]); }).code == Code::kDataLoss);
  CHECK(refused([](auto& of) { of[0][8] = 1; }).message ==
        "chunk: given version 1 of the format; allowed: 3");
}

TEST_CASE("an export of layers that cannot be is refused") {
  const auto read = [](const LayerSpec& layer) {
    ExportedSession session{spec_of({layer}), 0, 16, 16, 0, 0, {0}};
    Bytes chunk = description_chunk(session);
    seal_chunk(chunk, 0, true, std::array<std::byte, kChunkNonceBytes>{});
    return refusal([&] { read_exported(chunk.span()); });
  };
  CHECK(read({5, 3, false}).ok());
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(read({-1, 0, true, {1.5F, -infinity}}).ok());
  CHECK(read({5, 3, false, {0, infinity}}).message ==
        "chunk: the sinks of layer 0 are out of range");
  constexpr std::int64_t kTooMany = kMostTokens + 1;
  for (const LayerSpec& layer : std::vector<LayerSpec>{{-2, 0, false},
                                                       {kTooMany, 0, false},
                                                       {5, -1, false},
                                                       {5, kTooMany, false},
                                                       {-1, 3, false},
                                                       {5, 0, true}}) {
    CHECK(read(layer).code == Code::kDataLoss);
    CHECK(read(layer).message == "chunk: what layer 0 sees is out of range");
  }
}

TEST_CASE("an import that does not fit is refused") {
  KvSessions store(config_of(1 << 20));
  std::vector<std::uint64_t> held;
  const std::vector<std::string> chunks =
      chunks_of(store.export_session(filled(store, held, 150), "me"), 2000);
  KvSessions small(config_of(16 << 10));
  CHECK(refusal([&] { imported(small, chunks); }).code == Code::kResourceExhausted);
  CHECK(small.statistics().pages_promised == 0);
  KvConfig other = config_of(1 << 20);
  other.page_tokens = 32;
  KvSessions wide(other);
  CHECK(refusal([&] { imported(wide, chunks); }).message ==
        "chunk: given pages of 16 tokens; allowed: 32");
  {
    KvImport let_go =
        store.import_session(read_exported(bytes_of(chunks[0])), {}, Duration::zero(), "you");
    let_go.add(bytes_of(chunks[0]));
    let_go.add(bytes_of(chunks[1]));
  }
  CHECK(store.statistics().sessions == 1);
}
