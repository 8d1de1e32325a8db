// What callers ask of KV sessions, as values.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sessions/page_layout.h"

namespace attnserve::sessions {

// Which keys a query of a layer sees.
struct LayerSpec {
  std::int64_t window = -1;     // keys before its own that a query sees; -1: all
  std::int64_t kept_first = 0;  // with a window: the session's first keys, which it sees besides
  bool cross = false;           // keys are written once, and every query sees all of them
  std::vector<float> sinks{};   // of each head, -inf: none; empty: the model's own

  bool operator==(const LayerSpec&) const = default;
};

struct ModelName {
  std::string model, version;

  bool operator==(const ModelName&) const = default;
};

// What the sessions of one model, opened alike, have in common. The sessions of a step have equal
// ones; equal ones are one object.
struct SessionSpec {
  std::string model;  // of all layers: its name, and
  std::string version;
  PageLayout layout;
  std::vector<LayerSpec> layers;
  std::vector<ModelName> layer_models;  // or of each layer; then those above are empty

  bool operator==(const SessionSpec&) const = default;
};
using SessionSpecPtr = std::shared_ptr<const SessionSpec>;

// Stands for the tokens of one page, to whoever made it; pages before it are added by the server.
constexpr std::size_t kPageHashBytes = 32;
using PageHash = std::array<std::uint8_t, kPageHashBytes>;

struct NewSession {
  std::uint64_t max_tokens = 0;
  std::uint64_t reserved_tokens = 0;  // 0: max_tokens
  std::uint64_t cross_tokens = 0;     // the most keys of its cross layers
  std::vector<PageHash> prefix_hashes;
};

struct SessionState {
  std::string id;
  std::uint64_t length = 0;  // tokens that it holds; those of a tree only once committed
  std::uint64_t max_tokens = 0;
  std::uint64_t reserved_tokens = 0;
  std::chrono::microseconds lease{0};
};

struct SessionStep {
  std::string_view id;
  std::uint64_t new_tokens = 0;
  std::span<const std::int32_t> parents;  // none: no tree
  // Of the pages that are full after the step and have no hash yet: either all of them or none.
  std::vector<PageHash> prefix_hashes;
  std::uint64_t cross_tokens = 0;
};

struct Growth {                       // of a session that begins as another one or from an export
  std::uint64_t max_tokens = 0;       // 0: as the other's
  std::uint64_t reserved_tokens = 0;  // 0: max_tokens
};

}  // namespace attnserve::sessions
