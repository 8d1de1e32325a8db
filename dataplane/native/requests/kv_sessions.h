// The checks of Decode's actions that need no session: against the model, the limits and each
// other. What a session holds, and whether it is there, the store knows (sessions/).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "engine/model.h"
#include "requests/attend.h"
#include "requests/limits.h"
#include "sessions/page_layout.h"
#include "wire/kv_sessions.h"

namespace attnserve::requests {

constexpr std::int64_t kMostLayers = 1024;
constexpr std::int64_t kMostSessionTokens = 1 << 24;  // that one session may grow to
constexpr std::size_t kHashBytes = 32;
constexpr std::string_view kPagedVariant = "paged";  // the one that reads pages

// Says which tokens are in a page.
using PrefixHash = std::array<std::byte, kHashBytes>;

// All values below need the message no more.

struct KvLayer {
  std::int64_t window = 0;  // keys up to its own that a query sees; 0: all
  std::int64_t kept_first = 0;
  bool cross = false;
  bool operator==(const KvLayer&) const = default;
};

// What a session may grow to, and what it is promised. Zeros: not said.
struct KvRoom {
  std::int64_t max_tokens = 0, reserved_tokens = 0;
  bool operator==(const KvRoom&) const = default;
};

struct OpenPlan {
  struct Session {
    KvRoom room;
    std::int64_t cross_tokens = 0;
    std::vector<PrefixHash> prefix_hashes;
  };
  engine::ModelPtr model;
  const engine::Variant* paged = nullptr;
  sessions::CacheType cache_type = sessions::CacheType::kFp32;
  std::vector<KvLayer> layers;  // each of them
  std::vector<Session> opened;  // in the order of the request
};

// `page_tokens`: of a page, at least 1. Throws RequestError: NOT_FOUND, INVALID_ARGUMENT, or
// FAILED_PRECONDITION for a model that keeps no sessions, or not of such layers.
OpenPlan plan_open(const wire::OpenSessions& message, const Context& context,
                   std::int64_t page_tokens);

struct StepPlan {
  struct Session {
    std::string id;
    std::int64_t new_tokens = 0, cross_tokens = 0;
    std::vector<std::int32_t> parents;  // none: no tree
    std::vector<PrefixHash> prefix_hashes;
  };
  std::uint64_t step_id = 0;
  std::uint32_t priority = kNormal;
  std::vector<Session> sessions;
  std::int64_t tokens = 0, cross_tokens = 0;  // of all sessions
};

// Throws RequestError INVALID_ARGUMENT.
StepPlan plan_step(const wire::BeginStep& message, const Limits& limits);

// What the layers of a step are, as `opened` and `begun`. Views.
struct StepShape {
  const engine::ModelFacts& model;
  std::span<const KvLayer> layers;
  std::int64_t tokens = 0, cross_tokens = 0;  // of all sessions
};

// What one AttendLayer brings: the query, or key and value, or all three.
struct LayerPart {
  std::uint32_t layer = 0;
  std::optional<TensorSpec> query, key, value;
  bool has_query() const { return query.has_value(); }
  bool has_key() const { return key.has_value(); }

  // Of the part with the query:
  std::vector<wire::LayerResult> results;  // in the order of their field numbers
  std::optional<Region> output_region;     // where they go; none: into the answer
  std::size_t response_bytes = 0;
};

// Whether a layer takes key and value in this step; a cross layer does not, once they are there.
bool takes_key(const StepShape& step, const KvLayer& layer);

// Throws RequestError INVALID_ARGUMENT, or RESOURCE_EXHAUSTED for tensors of more bytes than are
// allowed.
LayerPart check_layer(const wire::AttendLayer& message, const StepShape& step,
                      const Limits& limits);

// "session_id: given nothing; allowed: ...", INVALID_ARGUMENT. The other actions have little else
// that can be checked: accepted indices rise, room is no more than there may be, a chunk is not
// empty. They throw INVALID_ARGUMENT.
void check_session_id(std::string_view session_id);
void check_commit(const wire::CommitTree& message);
KvRoom check_fork(const wire::ForkSession& message);
KvRoom check_import(const wire::ImportSession& message);

}  // namespace attnserve::requests
