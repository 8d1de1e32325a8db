// Whatever a request of Decode says: it is refused in words, or what was checked is as the store
// and the engine rely on.
#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <variant>

#include "requests/kv_sessions.h"
#include "sessions/kv_sessions.h"
#include "tests/requests_support.h"
#include "wire/kv_sessions.h"

namespace {

using namespace attnserve;
using namespace attnserve::requests;

constexpr std::size_t kPageTokens = 16;
// Of the step whose layers come, of two sessions.
constexpr std::int64_t kTokens = 2, kCrossTokens = 5;
constexpr std::array<std::int64_t, 3> kStarts{0, 1, 2};
constexpr std::array<std::int64_t, 2> kKeys{1, 30}, kCrossKeys{2, 3};

void require(bool holds) {
  if (!holds) std::abort();
}

engine::ModelFacts paged_facts() {
  engine::ModelFacts facts = core_facts("paged");
  facts.num_heads = 2;
  facts.num_kv_heads = 1;
  facts.head_dim = facts.value_head_dim = 4;
  return facts;
}

engine::ModelFacts block_facts() {
  engine::ModelFacts facts = paged_facts();
  facts.name = "block";
  facts.kind = engine::Kind::kLayer;
  facts.embed_dim = 8;
  return facts;
}

struct Server {
  World world;
  std::vector<sessions::LayerSpec> layers{{}, {7, 4, false}, {-1, 0, true}};
  Server() {
    const auto model = model_of(paged_facts());
    add(*model, "paged", {"query", "cache", "weights_of"}, {"output"}, true);
    world.models.put("paged", {model});
    const auto block = model_of(block_facts());
    add(*block, "paged", {"hidden_states", "cache"}, {"output"}, true);
    world.models.put("block", {block});
  }
};

Server& server() {
  static Server one;
  return one;
}

void check_growth(const sessions::Growth& growth) {
  require(growth.max_tokens <= sessions::kMostTokens);
  require(growth.reserved_tokens <= sessions::kMostTokens);
  require(growth.max_tokens == 0 || growth.reserved_tokens <= growth.max_tokens);
}

// What is checked of each action.
struct Check {
  void operator()(const std::monostate&) const {}
  void operator()(const wire::AbandonStep&) const {}
  void operator()(const wire::OpenSessions& open) const {
    const OpenPlan plan = plan_open(open, server().world.context(), kPageTokens);
    require(plan.models.of(0).paged != nullptr && plan.opened.size() == open.sessions.size());
    require(plan.spec.layers.size() == open.num_layers);
    bool cross = false;
    for (const sessions::LayerSpec& layer : plan.spec.layers) {
      cross |= layer.cross;
      require(layer.window >= -1 && layer.kept_first >= 0);
      require(layer.window >= 0 || layer.kept_first == 0);
      require(!layer.cross || layer.window == -1);
    }
    for (const sessions::NewSession& session : plan.opened) {
      check_growth({session.max_tokens, session.reserved_tokens});
      require(session.max_tokens > 0 && (session.cross_tokens > 0) == cross);
      require(session.prefix_hashes.size() * kPageTokens <= session.max_tokens);
    }
    kv_models(plan.spec, server().world.context());
  }
  void operator()(const wire::BeginStep& step) const {
    check(plan_step(step, server().world.limits));
  }
  void check(const StepPlan& plan) const {
    std::uint64_t tokens = 0, cross_tokens = 0;
    for (const sessions::SessionStep& session : plan.sessions) {
      require(session.new_tokens > 0);
      tokens += session.new_tokens;
      cross_tokens += session.cross_tokens;
      require(!plan.queries_only || (session.parents.empty() && session.prefix_hashes.empty() &&
                                     session.cross_tokens == 0));
      require(session.parents.empty() || session.parents.size() == session.new_tokens);
      for (std::size_t at = 0; at < session.parents.size(); ++at) {
        require(session.parents[at] >= -1 && session.parents[at] < static_cast<int>(at));
      }
    }
    require(static_cast<std::uint64_t>(plan.tokens) == tokens);
    require(static_cast<std::uint64_t>(plan.cross_tokens) == cross_tokens);
  }
  void operator()(const wire::AttendLayer& message) const {
    if (message.begin) check(plan_begun_step(message, server().world.limits));
    // Of a layer model if it says so.
    const bool of_block = message.hidden_states && message.step_id % 5 == 0;
    const engine::ModelFacts facts = of_block ? block_facts() : paged_facts();
    const bool latent = !of_block && message.step_id % 3 == 0;
    const StepShape step{
        facts,  server().layers, kTokens, message.step_id % 2 == 0 ? 0 : kCrossTokens,
        latent, kStarts,         kKeys,   kCrossKeys};
    const LayerPart part = check_layer(message, step, server().world.limits);
    require(part.layer < step.layers.size() && (part.has_query() || part.has_key()));
    require((part.key.has_value() && !latent) == part.value.has_value());
    std::int64_t before = -1;
    for (const std::int64_t session : part.weights_of) {
      require(session > before && session < 2);
      before = session;
    }
    require(part.has_query() != part.results.empty());
    require(part.hidden_states.has_value() == of_block && !(part.query && of_block));
    if (of_block) require(part.hidden_states->shape == Shape{kTokens, facts.embed_dim});
    for (const auto* spec : {&part.query, &part.key, &part.value}) {
      if (!*spec) continue;
      require(!(*spec)->chunked && !(*spec)->stored && (*spec)->shape.rank() == 3);
      require(Tensor{(*spec)->dtype, (*spec)->shape, nullptr}.byte_size() == (*spec)->byte_size);
    }
  }
  void operator()(const wire::ImportSession& session) const {
    check_import(session);
    require(!session.chunk.data.empty());
  }
  void operator()(const auto&) const {}  // the store checks them
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const ByteSpan message = std::as_bytes(std::span(data, size));
  try {
    std::visit(Check{}, wire::decode_decode(message).action);
  } catch (const RequestError& error) {
    require(error.status().code != Code::kOk && error.status().code != Code::kInternal);
    require(!error.status().message.empty());
  }
  return 0;
}
