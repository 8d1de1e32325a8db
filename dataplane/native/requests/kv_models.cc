// Which models compute the layers of sessions.
#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "base/status.h"
#include "base/text.h"
#include "engine/paged.h"
#include "requests/kv_room.h"
#include "requests/kv_sessions.h"
#include "requests/refusal.h"
#include "sessions/kv_sessions.h"

namespace attnserve::requests {
namespace {

constexpr std::string_view kModelNames = "a name that ListModels gives";

[[noreturn]] void refuse_model(const engine::Model& model, std::string_view why) {
  throw RequestError(Code::kFailedPrecondition,
                     text("model: ", model.facts.name, " version ", model.version_text, " ", why));
}

KvModel paged(engine::ModelPtr found) {
  const engine::Model& model = *found;
  if (model.facts.kind == engine::Kind::kTransformer) {
    refuse_model(model,
                 "is a transformer; allowed: a core model, to which callers send query, key and "
                 "value, or a layer model, to which they send hidden states");
  }
  if (model.on_cuda) {
    refuse_model(model, "runs on CUDA; allowed: models on the CPU, where sessions are kept");
  }
  const engine::Variant* variant = model.named(engine::kPagedVariant);
  if (variant == nullptr) {
    refuse_model(model, text("has no variant ", quoted(engine::kPagedVariant),
                             "; allowed: a model that has one: export it again"));
  }
  return {std::move(found), variant};
}

struct Property {
  std::string_view name;
  std::int64_t engine::ModelFacts::* member;
};
constexpr std::array<Property, 5> kAlike{{{"num_heads", &engine::ModelFacts::num_heads},
                                          {"num_kv_heads", &engine::ModelFacts::num_kv_heads},
                                          {"head_dim", &engine::ModelFacts::head_dim},
                                          {"value_head_dim", &engine::ModelFacts::value_head_dim},
                                          {"embed_dim", &engine::ModelFacts::embed_dim}}};

// One of several models.
void check_of_layer(const engine::ModelFacts& model, const engine::ModelFacts& first) {
  if (model.kind != engine::Kind::kLayer) {
    throw RequestError(
        Code::kFailedPrecondition,
        text("model: ", model.name, " is a ", name_of(model.kind), "; allowed: a layer model"));
  }
  const auto differs = [&](std::string_view what, const auto& given, const auto& allowed) {
    refuse("model", text(model.name, " of ", what, " ", given),
           text(what, " ", allowed, ", as the first layer's, ", first.name, ", has"));
  };
  for (const Property& each : kAlike) {
    const std::int64_t given = model.*each.member, allowed = first.*each.member;
    if (given != allowed) differs(each.name, given, allowed);
  }
  if (model.dtype != first.dtype) differs("dtype", name_of(model.dtype), name_of(first.dtype));
}

// Each layer's; one for all if they are the same. `find(i)` gives that of layer i.
template <class Find>
KvModels models_of_layers(std::size_t count, Find find) {
  std::vector<KvModel> models;
  models.reserve(count);
  for (std::size_t layer = 0; layer < count; ++layer) {
    try {
      models.push_back(find(layer));
      check_of_layer(models.back().facts(), models.front().facts());
    } catch (const RequestError& error) {
      Status status = error.status();
      status.message = text("layer_models[", layer, "].", status.message);
      throw RequestError(std::move(status));
    }
  }
  const auto is_first = [&](const KvModel& each) { return each.model == models.front().model; };
  if (std::ranges::all_of(models, is_first)) models.resize(1);
  return KvModels(std::move(models));
}

}  // namespace

bool needs_plain_layers(const KvModel& model) {
  return model.facts().kind == engine::Kind::kLayer || engine::takes_positions(*model.paged);
}

void check_takes_sinks(const KvModel& model) {
  if (engine::takes_sinks(*model.paged)) return;
  refuse_model(*model.model,
               "was exported before sessions had sinks; allowed: the model exported again");
}

void check_latent(const KvModel& model) {
  const engine::ModelFacts& facts = model.facts();
  if (facts.value_head_dim > facts.head_dim) {
    refuse_model(*model.model,
                 text("has value_head_dim ", facts.value_head_dim, " and head_dim ", facts.head_dim,
                      "; allowed for latent layers: value_head_dim of at most head_dim"));
  }
  if (!engine::gives_weights(*model.paged)) {
    refuse_model(*model.model, text("has a variant ", quoted(engine::kPagedVariant),
                                    " without latent layers; allowed: export it again"));
  }
}

KvModels::KvModels(std::vector<KvModel> models)
    : models_(std::move(models)),
      give_weights_(std::ranges::all_of(
          models_, [](const KvModel& each) { return engine::gives_weights(*each.paged); })) {}

void KvModels::name(sessions::SessionSpec& spec) const {
  const auto named = [](const KvModel& each) {
    return sessions::ModelName{each.facts().name, each.model->version_text};
  };
  if (models_.size() == 1) {
    auto [model, version] = named(models_.front());
    spec.model = std::move(model);
    spec.version = std::move(version);
    return;
  }
  for (const KvModel& each : models_) spec.layer_models.push_back(named(each));
}

KvModels models_to_open(const wire::OpenSessions& message, const Context& context) {
  const std::size_t count = message.layer_models.size();
  if (count == 0) {
    if (message.model.empty()) refuse("model", "nothing", kModelNames);
    return KvModels({paged(context.models.get(message.model, message.version))});
  }
  for (const auto& [field, given] :
       {std::pair{"model", message.model}, std::pair{"version", message.version}}) {
    if (!given.empty()) refuse(field, shown(given), "nothing with layer_models");
  }
  checked_tokens("num_layers", message.num_layers, 1, sessions::kMostLayers);
  if (count != message.num_layers) {
    refuse("layer_models", text(count, " of them"),
           text("none, or num_layers, ", message.num_layers));
  }
  return models_of_layers(count, [&](std::size_t layer) {
    const wire::ModelOfLayer& asked = message.layer_models[layer];
    if (asked.model.empty()) refuse("model", "nothing", kModelNames);
    return paged(context.models.get(asked.model, asked.version));
  });
}

void check_queries_only(const sessions::SessionSpec& spec, const KvModels& models) {
  for (std::size_t layer = 0; layer < spec.layers.size(); ++layer) {
    const KvModel& model = models.of(layer);
    if (spec.layers[layer].window < 0 && !spec.layout.latent && !needs_plain_layers(model)) {
      continue;
    }
    refuse_model(*model.model,
                 text("has in layer ", layer,
                      " a window, a latent row or positions of its own; allowed with queries_only: "
                      "layers of a core model without them"));
  }
}

KvModels kv_models(const sessions::SessionSpec& spec, const Context& context) {
  const sessions::PageLayout& layout = spec.layout;
  const bool all_cross = std::ranges::all_of(spec.layers, &sessions::LayerSpec::cross);
  const bool any_cross = std::ranges::any_of(spec.layers, &sessions::LayerSpec::cross);
  const auto find = [&](const std::string& name, const std::string& version) {
    KvModel model = paged(context.models.get(name, version));
    const engine::ModelFacts& facts = model.facts();
    const bool masks = facts.mask == engine::Mask::kCausal || all_cross;
    if (!masks || ((any_cross || layout.latent) && needs_plain_layers(model)) ||
        layout != layout_of(facts, layout.type, layout.page_tokens, layout.latent)) {
      refuse_model(*model.model,
                   text("has other heads or another mask than the session: num_kv_heads ",
                        layout.num_kv_heads, ", head_dim ", layout.head_dim, ", value_head_dim ",
                        layout.value_head_dim, "; allowed: the model that it was opened with"));
    }
    const auto sinks_fit = [&](const sessions::LayerSpec& layer) {
      return layer.sinks.empty() ||
             (facts.kind == engine::Kind::kCore && std::ssize(layer.sinks) == facts.num_heads);
    };
    if (std::ranges::any_of(spec.layers, [](auto& layer) { return !layer.sinks.empty(); })) {
      check_takes_sinks(model);
    }
    if (!std::ranges::all_of(spec.layers, sinks_fit)) {
      refuse_model(*model.model,
                   "has other heads than the session has sinks; allowed: the model that it was "
                   "opened with");
    }
    if (layout.latent) check_latent(model);
    return model;
  };
  if (spec.layer_models.empty()) return KvModels({find(spec.model, spec.version)});
  return models_of_layers(spec.layer_models.size(), [&](std::size_t layer) {
    return find(spec.layer_models[layer].model, spec.layer_models[layer].version);
  });
}

sessions::PageLayout layout_of(const engine::ModelFacts& model, sessions::CacheType type,
                               std::size_t page_tokens, bool latent) {
  return {static_cast<std::size_t>(model.num_kv_heads),
          static_cast<std::size_t>(model.head_dim),
          static_cast<std::size_t>(model.value_head_dim),
          type,
          page_tokens,
          latent};
}

}  // namespace attnserve::requests
