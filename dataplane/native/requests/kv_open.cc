#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "base/status.h"
#include "base/text.h"
#include "requests/kv_room.h"
#include "requests/kv_sessions.h"
#include "requests/refusal.h"

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

[[noreturn]] void refuse_model(const engine::Model& model, std::string_view why) {
  throw RequestError(Code::kFailedPrecondition,
                     text("model: ", model.facts.name, " version ", model.version_text, " ", why));
}

const engine::Variant& paged_variant(const engine::Model& model) {
  if (model.facts.kind != engine::Kind::kCore) {
    refuse_model(model,
                 text("is a ", name_of(model.facts.kind),
                      "; allowed: a core model, to which callers send query, key and value"));
  }
  if (model.on_cuda) {
    refuse_model(model, "runs on CUDA; allowed: models on the CPU, where sessions are kept");
  }
  const engine::Variant* paged = model.named(kPagedVariant);
  if (paged == nullptr) {
    refuse_model(model, text("has no variant ", quoted(kPagedVariant),
                             "; allowed: a model that was exported with it"));
  }
  return *paged;
}

KvLayer checked_layer(const std::string& field, const wire::LayerSpec& message,
                      const engine::ModelFacts& model) {
  KvLayer layer;
  layer.cross = message.cross;
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
  layer.window = message.window ? checked_tokens(text(field, ".window"), *message.window, 0,
                                                 kMostSessionTokens)
                                : model.window.value_or(0);
  layer.kept_first =
      checked_tokens(text(field, ".kept_first"), message.kept_first, 0, kMostSessionTokens);
  if (layer.window == 0 && layer.kept_first != 0) {
    refuse(text(field, ".kept_first"), std::to_string(layer.kept_first),
           "0 without a window, as every key is kept");
  }
  return layer;
}

std::vector<KvLayer> checked_layers(const wire::OpenSessions& message,
                                    const engine::ModelFacts& model) {
  if (message.num_layers < 1 || message.num_layers > kMostLayers) {
    refuse("num_layers", std::to_string(message.num_layers), text("1..", kMostLayers));
  }
  const std::size_t count = message.num_layers;
  if (message.layers.empty()) return std::vector(count, checked_layer("layers[0]", {}, model));
  if (message.layers.size() != 1 && message.layers.size() != count) {
    refuse("layers", text(message.layers.size(), " of them"),
           text("none, 1 for all, or num_layers, ", count));
  }
  std::vector<KvLayer> layers;
  layers.reserve(count);
  for (std::size_t at = 0; at < message.layers.size(); ++at) {
    layers.push_back(checked_layer(text("layers[", at, "]"), message.layers[at], model));
  }
  layers.resize(count, layers.front());
  return layers;
}

OpenPlan::Session checked_session(const std::string& field, const wire::NewSession& message,
                                  bool any_cross, std::int64_t page_tokens) {
  OpenPlan::Session session;
  const auto name = [&](std::string_view part) { return text(field, ".", part); };
  checked_tokens(name("max_tokens"), message.max_tokens, 1, kMostSessionTokens);
  session.room = checked_room(text(field, "."), message.max_tokens, message.reserved_tokens);
  if (session.room.reserved_tokens == 0) session.room.reserved_tokens = session.room.max_tokens;
  if (!any_cross && message.cross_tokens != 0) {
    refuse(name("cross_tokens"), std::to_string(message.cross_tokens), "0 without a cross layer");
  }
  session.cross_tokens = checked_tokens(name("cross_tokens"), message.cross_tokens,
                                        any_cross ? 1 : 0, kMostSessionTokens);
  session.prefix_hashes = checked_hashes(name("prefix_hashes"), message.prefix_hashes);
  if (any_cross && !session.prefix_hashes.empty()) {
    refuse(name("prefix_hashes"), text(session.prefix_hashes.size(), " pages"),
           "none with a cross layer");
  }
  const std::int64_t pages = session.room.max_tokens / page_tokens;
  if (static_cast<std::int64_t>(session.prefix_hashes.size()) > pages) {
    refuse(name("prefix_hashes"), text(session.prefix_hashes.size(), " pages"),
           text("0..", pages, ", as max_tokens has full pages of ", page_tokens));
  }
  return session;
}

}  // namespace

OpenPlan plan_open(const wire::OpenSessions& message, const Context& context,
                   std::int64_t page_tokens) {
  if (message.model.empty()) refuse("model", "nothing", "a name that ListModels gives");
  OpenPlan plan;
  plan.model = context.models.get(message.model, message.version);
  plan.paged = &paged_variant(*plan.model);
  plan.layers = checked_layers(message, plan.model->facts);
  plan.cache_type = checked_cache_type(message.cache_type, plan.model->facts);
  const std::size_t count = message.sessions.size();
  if (count < 1 || count > static_cast<std::size_t>(context.limits.max_batch)) {
    refuse("sessions", text(count, " of them"), text("1..", context.limits.max_batch));
  }
  const bool any_cross = std::ranges::any_of(plan.layers, &KvLayer::cross);
  plan.opened.reserve(count);
  for (std::size_t at = 0; at < count; ++at) {
    plan.opened.push_back(
        checked_session(text("sessions[", at, "]"), message.sessions[at], any_cross, page_tokens));
  }
  return plan;
}

}  // namespace attnserve::requests
