// The checks of Decode's actions that need no session: against the model, the limits and each
// other. What a session holds, and whether it is there, the store knows (sessions/).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/model.h"
#include "requests/attend.h"
#include "requests/limits.h"
#include "sessions/kv_spec.h"
#include "wire/kv_sessions.h"

namespace attnserve::requests {

// A model that can be computed on pages.
struct KvModel {
  engine::ModelPtr model;
  const engine::Variant* paged = nullptr;  // of the model
  const engine::ModelFacts& facts() const { return model->facts; }
};

// Whether its graph makes query and key itself, of hidden states or by position: not of cross or
// latent layers.
bool needs_plain_layers(const KvModel& model);
// Rows of a latent layer hold the value at their beginning. Throws RequestError FAILED_PRECONDITION
// for a model of other dimensions, or of a graph that knows no such layers.
void check_latent(const KvModel& model);
// Refuses models exported before there were sinks.
void check_takes_sinks(const KvModel& model);

// The models of a session's layers: one for all, or one for each, of equal heads, dimensions and
// dtype.
class KvModels {
 public:
  KvModels() = default;
  explicit KvModels(std::vector<KvModel> models);  // at least one

  const KvModel& of(std::size_t layer) const {
    return models_.size() == 1 ? models_.front() : models_[layer];
  }
  std::size_t size() const { return models_.size(); }
  // Of any of them: kind, heads, dimensions and dtype.
  const engine::ModelFacts& facts() const { return models_.front().facts(); }
  bool give_weights() const { return give_weights_; }  // all of them, of their graphs
  void name(sessions::SessionSpec& spec) const;        // says in it which they are

 private:
  std::vector<KvModel> models_;
  bool give_weights_ = false;
};

// The models of sessions that are to be opened. Throws RequestError as plan_open.
KvModels models_to_open(const wire::OpenSessions& message, const Context& context);
// Those of sessions that were opened or exported before. Throws RequestError: NOT_FOUND or
// UNAVAILABLE, one is not here; FAILED_PRECONDITION, it is another one now.
KvModels kv_models(const sessions::SessionSpec& spec, const Context& context);

sessions::PageLayout layout_of(const engine::ModelFacts& model, sessions::CacheType type,
                               std::size_t page_tokens, bool latent);

struct OpenPlan {
  KvModels models;
  sessions::SessionSpec spec;
  std::vector<sessions::NewSession> opened;  // in the order of the request
};

// `page_tokens`: of a page. Throws RequestError: NOT_FOUND, INVALID_ARGUMENT, or
// FAILED_PRECONDITION for a model that keeps no sessions, or not of such layers.
OpenPlan plan_open(const wire::OpenSessions& message, const Context& context,
                   std::size_t page_tokens);

struct StepPlan {
  std::uint64_t step_id = 0;
  std::uint32_t priority = kNormal;
  std::vector<sessions::SessionStep> sessions;  // views into the message
  std::int64_t tokens = 0, cross_tokens = 0;    // of all sessions
  bool queries_only = false;
};

// Throws RequestError INVALID_ARGUMENT.
StepPlan plan_step(const wire::BeginStep& message, const Limits& limits);
// Of the step that a layer begins. Fields in messages as of BeginStep.
StepPlan plan_begun_step(const wire::AttendLayer& message, const Limits& limits);

// A step that brings queries alone. Throws RequestError FAILED_PRECONDITION.
void check_queries_only(const sessions::SessionSpec& spec, const KvModels& models);

// What the layers of a step are like. Views.
struct StepShape {
  const engine::ModelFacts& model;
  std::span<const sessions::LayerSpec> layers;
  std::int64_t tokens = 0, cross_tokens = 0;  // of all sessions
  bool latent = false;
  std::span<const std::int64_t> starts;  // [S+1], of each session's tokens
  // [S], keys of each session with those of the step: of a layer, and of a cross layer.
  std::span<const std::int64_t> keys, cross_keys;
  bool gives_weights = true;
  bool queries_only = false;
};

// What one AttendLayer brings: the query, or key and value, or all three; a latent layer has no
// value. Of a layer model: hidden states.
struct LayerPart {
  std::uint32_t layer = 0;
  std::optional<TensorSpec> query, key, value, hidden_states;
  bool has_query() const { return query.has_value() || hidden_states.has_value(); }
  bool has_key() const { return key.has_value(); }

  // Of the part with the query:
  std::vector<wire::LayerResult> results;  // in the order of their field numbers
  std::vector<std::int64_t> weights_of;    // sessions of the step, one for each kWeights
  std::optional<Region> output_region;     // where they go; none: into the answer
  std::size_t response_bytes = 0;
};

// Whether a layer takes key and value in this step; one of a layer model never does, a cross layer
// does not once they are there, and none does in a step of queries alone.
bool takes_key(const StepShape& step, const sessions::LayerSpec& layer);

// Throws RequestError: INVALID_ARGUMENT; RESOURCE_EXHAUSTED for tensors of more bytes than are
// allowed; FAILED_PRECONDITION for weights that the model does not give.
LayerPart check_layer(const wire::AttendLayer& message, const StepShape& step,
                      const Limits& limits);

// Throws RequestError INVALID_ARGUMENT for a chunk without data.
void check_import(const wire::ImportSession& message);

}  // namespace attnserve::requests
