// Tokens in the pages of KV sessions: written as the operator writes them, and checked.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "sessions/kv_sessions.h"

namespace attnserve::sessions::test {

// The bytes of one row follow from this alone.
inline std::uint64_t mixed(std::uint64_t value) {
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9U;
  value = (value ^ value >> 27) * 0x94D049BB133111EBU;
  return value ^ value >> 31;
}

// Calls `visit(offset in the page, bytes, seed)` for each row that a token has in a layer.
template <class Visit>
void each_row(const PageLayout& layout, std::size_t slot, std::size_t layer, std::uint64_t token,
              const Visit& visit) {
  for (std::size_t head = 0; head < layout.num_kv_heads; ++head) {
    const std::size_t row = layout.row_of(head, slot % layout.page_tokens);
    const std::uint64_t seed = mixed(token * 1024 + layer) + head * 4;
    visit(layout.key_at(row), layout.key_row_bytes(), mixed(seed));
    visit(layout.value_at(row), layout.value_row_bytes(), mixed(seed + 1));
    visit(layout.key_scale_at(row), layout.key_scale_bytes(), mixed(seed + 2));
    visit(layout.value_scale_at(row), layout.value_scale_bytes(), mixed(seed + 3));
  }
}

inline void write_token(const PageLayout& layout, std::byte* cache,
                        std::span<const std::int64_t> table, std::size_t slot, std::size_t layer,
                        std::uint64_t token) {
  std::byte* page = cache + table[slot / layout.page_tokens];
  each_row(layout, slot, layer, token, [&](std::size_t at, std::size_t bytes, std::uint64_t seed) {
    for (std::size_t index = 0; index < bytes; ++index) {
      page[at + index] = static_cast<std::byte>(seed >> 8 * (index % 8));
    }
  });
}

// Whether the token's rows are all there, bit for bit.
inline bool holds_token(const PageLayout& layout, const std::byte* cache,
                        std::span<const std::int64_t> table, std::size_t slot, std::size_t layer,
                        std::uint64_t token) {
  const std::size_t number = slot / layout.page_tokens;
  if (number >= table.size() || table[number] < 0) return false;
  const std::byte* page = cache + table[number];
  bool same = true;
  each_row(layout, slot, layer, token, [&](std::size_t at, std::size_t bytes, std::uint64_t seed) {
    for (std::size_t index = 0; index < bytes; ++index) {
      same = same && page[at + index] == static_cast<std::byte>(seed >> 8 * (index % 8));
    }
  });
  return same;
}

// Stands for the tokens of each full page.
inline std::vector<PageHash> hashes_of(const std::vector<std::uint64_t>& tokens,
                                       std::size_t page_tokens, std::size_t first = 0) {
  std::vector<PageHash> hashes;
  for (std::size_t page = first; page < tokens.size() / page_tokens; ++page) {
    std::uint64_t sum = 1;
    for (std::size_t index = 0; index < page_tokens; ++index) {
      sum = mixed(sum + tokens[page * page_tokens + index]);
    }
    PageHash hash{};
    std::memcpy(hash.data(), &sum, sizeof sum);
    hashes.push_back(hash);
  }
  return hashes;
}

template <class Action>
Status refusal(const Action& action) {
  try {
    action();
  } catch (const RequestError& error) {
    return error.status();
  }
  return {};
}

inline SessionSpec spec_of(std::vector<LayerSpec> layers, CacheType type = CacheType::kFp32,
                           std::size_t head_dim = 8, bool latent = false) {
  return {"core", "1", {2, head_dim, head_dim, type, 16, latent}, std::move(layers), {}};
}

inline NewSession room_for(std::uint64_t max_tokens, std::uint64_t reserved_tokens = 0) {
  return {max_tokens, reserved_tokens, 0, {}};
}

// Bytes that an owner is promised, as a refusal tells them.
inline std::size_t promised_to(KvSessions& store, std::string_view owner) {
  const NewSession asked = room_for(1);
  const Status refused = refusal([&] {
    store.open(spec_of({{}}), std::span(&asked, 1), Duration::zero(), SessionOwner(owner, 0, 1));
  });
  const auto number_after = [&](std::string_view words) {
    return std::stoull(refused.message.substr(refused.message.find(words) + words.size()));
  };
  return number_after("sessions[0]: ") - number_after("caller, with ");
}

// Opens one session.
inline std::string open_one(KvSessions& store, const SessionSpec& spec, const NewSession& session,
                            std::string_view owner = "me") {
  return store.open(spec, std::span(&session, 1), Duration::zero(), owner).front().id;
}

inline std::shared_ptr<KvStep> begin_one(KvSessions& store, const std::string& id,
                                         std::uint64_t new_tokens, std::string_view owner = "me") {
  const SessionStep step{id, new_tokens, {}, {}, 0};
  return store.begin_step(std::span(&step, 1), owner);
}

// All layers of a step, in order, without looking at them.
inline void run_layers(KvSessions& store, const std::shared_ptr<KvStep>& step) {
  for (std::size_t layer = 0; layer < step->spec().layers.size(); ++layer) {
    store.begin_layer(step, layer).done();
  }
}

inline void step_one(KvSessions& store, const std::string& id, std::uint64_t new_tokens,
                     std::string_view owner = "me") {
  run_layers(store, begin_one(store, id, new_tokens, owner));
}

// Takes a step that writes tokens, and publishes those pages that are full of them.
inline void say(KvSessions& store, const std::string& id, std::vector<std::uint64_t>& held,
                const std::vector<std::uint64_t>& tokens, bool publish,
                std::string_view owner = "me") {
  const std::size_t before = held.size();
  held.insert(held.end(), tokens.begin(), tokens.end());
  const std::size_t page_tokens = store.config().page_tokens;
  SessionStep asked{id, tokens.size(), {}, {}, 0};
  if (publish) asked.prefix_hashes = hashes_of(held, page_tokens, before / page_tokens);
  const auto step = store.begin_step(std::span(&asked, 1), owner);
  for (std::size_t layer = 0; layer < step->spec().layers.size(); ++layer) {
    KvLayer running = store.begin_layer(step, layer);
    for (std::size_t index = 0; index < tokens.size(); ++index) {
      write_token(step->spec().layout, store.cache().data(), running.sequences()[0].table,
                  before + index, layer, tokens[index]);
    }
    running.done();
  }
}

}  // namespace attnserve::sessions::test
