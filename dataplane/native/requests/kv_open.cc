#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <utility>

#include "base/status.h"
#include "base/text.h"
#include "requests/kv_room.h"
#include "requests/kv_sessions.h"
#include "requests/refusal.h"
#include "sessions/kv_sessions.h"

namespace attnserve::requests {
namespace {

using sessions::CacheType;

constexpr std::array<std::string_view, 6> kCacheTypes{"CACHE_AS_MODEL", "CACHE_FP32", "CACHE_FP16",
                                                      "CACHE_BF16",     "CACHE_INT8", "CACHE_FP8"};

CacheType type_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFp16:
      return CacheType::kFp16;
    case DataType::kBf16:
      return CacheType::kBf16;
    default:
      return CacheType::kFp32;
  }
}

CacheType checked_cache_type(std::int32_t number, const engine::ModelFacts& model) {
  if (number < 0 || static_cast<std::size_t>(number) >= kCacheTypes.size()) {
    std::string allowed;
    for (const std::string_view name : kCacheTypes) {
      if (!allowed.empty()) allowed += ", ";
      allowed += name;
    }
    refuse("cache_type", std::to_string(number), allowed);
  }
  // The operator's numbers are one less: it knows no model to be as.
  return number == 0 ? type_of(model.dtype) : static_cast<CacheType>(number - 1);
}

// Callers count a query's own key in its window, the store does not.
std::int64_t store_window(std::uint64_t window) { return static_cast<std::int64_t>(window) - 1; }

void check_plain(const std::string& field, const wire::LayerSpec& message, const KvModel& used) {
  if ((!message.cross && !message.latent) || !needs_plain_layers(used)) return;
  const bool layer = used.facts().kind == engine::Kind::kLayer;
  refuse(
      text(field, message.cross ? ".cross" : ".latent"), "true",
      text("false, as ", used.facts().name, layer ? " is a layer model" : " has rotary embedding"));
}

std::vector<float> checked_sinks(const std::string& field, const wire::LayerSpec& message,
                                 const KvModel& used) {
  const std::vector<float>& sinks = message.sinks;
  if (sinks.empty()) return sinks;
  const engine::ModelFacts& facts = used.facts();
  const std::string given = text(sinks.size(), " of them");
  if (facts.kind == engine::Kind::kLayer) {
    refuse(text(field, ".sinks"), given, text("none, as ", facts.name, " is a layer model"));
  }
  if (sinks.size() != static_cast<std::size_t>(facts.num_heads)) {
    refuse(text(field, ".sinks"), given,
           text("none, or ", facts.num_heads, ", num_heads of the model"));
  }
  for (std::size_t head = 0; head < sinks.size(); ++head) {
    // NaN is not less either.
    if (sinks[head] < std::numeric_limits<float>::infinity()) continue;
    refuse(text(field, ".sinks[", head, "]"), number_text(sinks[head]),
           "finite numbers and -infinity");
  }
  check_takes_sinks(used);
  return sinks;
}

sessions::LayerSpec checked_layer(const std::string& field, const wire::LayerSpec& message,
                                  const KvModel& used) {
  const engine::ModelFacts& model = used.facts();
  check_plain(field, message, used);
  sessions::LayerSpec layer;
  layer.cross = message.cross;
  layer.sinks = checked_sinks(field, message, used);
  if (message.cross) {
    if (message.window || message.kept_first != 0) {
      refuse(text(field, message.window ? ".window" : ".kept_first"),
             std::to_string(message.window.value_or(message.kept_first)),
             "nothing for a cross layer, whose queries see all keys");
    }
    return layer;
  }
  if (model.mask != engine::Mask::kCausal) {
    throw RequestError(Code::kFailedPrecondition,
                       text(field, ".cross: given false; model ", model.name,
                            " is not causal; allowed: true, or a causal model"));
  }
  const std::uint64_t own = static_cast<std::uint64_t>(model.window.value_or(0));
  layer.window = store_window(checked_tokens(text(field, ".window"), message.window.value_or(own),
                                             0, sessions::kMostTokens));
  layer.kept_first = static_cast<std::int64_t>(
      checked_tokens(text(field, ".kept_first"), message.kept_first, 0, sessions::kMostTokens));
  if (layer.window < 0 && layer.kept_first != 0) {
    refuse(text(field, ".kept_first"), std::to_string(layer.kept_first),
           "0 without a window, as every key is kept");
  }
  return layer;
}

std::vector<sessions::LayerSpec> checked_layers(const wire::OpenSessions& message,
                                                const KvModels& models) {
  const std::size_t count =
      checked_tokens("num_layers", message.num_layers, 1, sessions::kMostLayers);
  if (message.layers.size() > 1 && message.layers.size() != count) {
    refuse("layers", text(message.layers.size(), " of them"),
           text("none, 1 for all, or num_layers, ", count));
  }
  std::vector<sessions::LayerSpec> layers;
  layers.reserve(count);
  for (std::size_t at = 0; at < std::max(models.size(), message.layers.size()); ++at) {
    const std::size_t given = message.layers.size() > 1 ? at : 0;
    const wire::LayerSpec& layer =
        message.layers.empty() ? wire::LayerSpec{} : message.layers[given];
    layers.push_back(checked_layer(text("layers[", given, "]"), layer, models.of(at)));
  }
  layers.resize(count, layers.front());
  return layers;
}

bool checked_latent(const wire::OpenSessions& message, const KvModel& model) {
  const bool latent = !message.layers.empty() && message.layers.front().latent;
  for (std::size_t at = 0; at < message.layers.size(); ++at) {
    if (message.layers[at].latent == latent) continue;
    refuse(text("layers[", at, "].latent"), latent ? "false" : "true",
           text(latent ? "true" : "false", ", as of layers[0]: all pages have one size"));
  }
  if (latent) check_latent(model);
  return latent;
}

sessions::NewSession checked_session(const std::string& field, const wire::NewSession& message,
                                     bool any_cross, std::size_t page_tokens) {
  const auto name = [&](std::string_view part) { return text(field, ".", part); };
  const sessions::Growth room =
      checked_room(text(field, "."), message.max_tokens, message.reserved_tokens);
  sessions::NewSession session{room.max_tokens, room.reserved_tokens, message.cross_tokens, {}};
  if (!any_cross && session.cross_tokens != 0) {
    refuse(name("cross_tokens"), std::to_string(session.cross_tokens), "0 without a cross layer");
  }
  checked_tokens(name("cross_tokens"), session.cross_tokens, any_cross ? 1 : 0,
                 sessions::kMostTokens);
  session.prefix_hashes = checked_hashes(name("prefix_hashes"), message.prefix_hashes);
  const std::size_t given = session.prefix_hashes.size();
  if (any_cross && given != 0) {
    refuse(name("prefix_hashes"), text(given, " pages"), "none with a cross layer");
  }
  const std::size_t pages = session.max_tokens / page_tokens;
  if (given > pages) {
    refuse(name("prefix_hashes"), text(given, " pages"),
           text("0..", pages, ", as max_tokens has full pages of ", page_tokens));
  }
  return session;
}

}  // namespace

OpenPlan plan_open(const wire::OpenSessions& message, const Context& context,
                   std::size_t page_tokens) {
  OpenPlan plan;
  plan.models = models_to_open(message, context);
  const engine::ModelFacts& facts = plan.models.facts();
  plan.spec.layers = checked_layers(message, plan.models);
  plan.spec.layout = layout_of(facts, checked_cache_type(message.cache_type, facts), page_tokens,
                               checked_latent(message, plan.models.of(0)));
  plan.models.name(plan.spec);
  const std::size_t count = message.sessions.size();
  if (count < 1 || count > static_cast<std::size_t>(context.limits.max_batch)) {
    refuse("sessions", text(count, " of them"), text("1..", context.limits.max_batch));
  }
  const bool any_cross = std::ranges::any_of(plan.spec.layers, &sessions::LayerSpec::cross);
  plan.opened.reserve(count);
  for (std::size_t at = 0; at < count; ++at) {
    plan.opened.push_back(
        checked_session(text("sessions[", at, "]"), message.sessions[at], any_cross, page_tokens));
  }
  return plan;
}

}  // namespace attnserve::requests
