#include <array>
#include <string>
#include <utility>

#include "base/text.h"
#include "requests/kv_sessions.h"
#include "requests/refusal.h"
#include "requests/sizes.h"
#include "requests/tensor_spec.h"

namespace attnserve::requests {
namespace {

template <std::size_t rank>
using Dims = std::array<std::string_view, rank>;
constexpr Dims<3> kQueryDims{"T", "H", "D"};
constexpr Dims<3> kKeyDims{"T", "Hkv", "D"}, kValueDims{"T", "Hkv", "Dv"};
constexpr Dims<3> kCrossKeyDims{"C", "Hkv", "D"}, kCrossValueDims{"C", "Hkv", "Dv"};
constexpr Dims<2> kHiddenDims{"T", "E"};
constexpr std::string_view kTokens = "T, the new_tokens of all sessions of the step";
constexpr std::string_view kCrossTokens = "C, the cross_tokens of all sessions of the step";

struct Expected {
  std::int64_t size;
  std::string_view what;
};

template <std::size_t rank>
TensorSpec checked(std::string_view field, const wire::TensorMessage& message,
                   const Dims<rank>& dims, DataType dtype,
                   const std::array<Expected, rank>& shape) {
  TensorSpec spec = check_tensor(TensorRule{field, dtype, dims}, message, false, nullptr);
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    if (spec.shape[axis] == shape[axis].size) continue;
    refuse(text(field, ".shape"), list_text(spec.shape.sizes()),
           text(shape[axis].size, " at axis ", axis, " (", shape[axis].what, ")"));
  }
  return spec;
}

// Of a layer model.
void check_hidden_there(const wire::AttendLayer& message) {
  const std::array<std::pair<std::string_view, bool>, 3> others{
      {{"query", message.query.has_value()},
       {"key", message.key.has_value()},
       {"value", message.value.has_value()}}};
  for (const auto& [field, given] : others) {
    if (given) refuse(field, "a tensor", "nothing for a layer model: hidden_states");
  }
  if (!message.hidden_states) refuse("hidden_states", "nothing", "[T, E]");
}

void check_there(const wire::AttendLayer& message, bool with_key, bool latent) {
  if (message.hidden_states) {
    refuse("hidden_states", "a tensor", "nothing for a core model: query, key and value");
  }
  if (latent && message.value) {
    refuse("value", "a tensor",
           text("nothing for layer ", message.layer, ", a latent layer, whose keys hold it"));
  }
  if (!message.query && !message.key && !message.value) {
    refuse("query", "nothing",
           !with_key ? "[T, H, D]"
           : latent  ? "query and key, or one of them"
                     : "query, key and value, or one part of them");
  }
  if (!with_key && (message.key || message.value)) {
    refuse(message.key ? "key" : "value", "a tensor",
           text("nothing for layer ", message.layer,
                ", as the step has queries_only, or the layer is cross and cross_tokens is 0"));
  }
  if (!latent && message.key.has_value() != message.value.has_value()) {
    refuse(message.key ? "value" : "key", "nothing", "both key and value, or neither");
  }
}

void check_key_and_value(const wire::AttendLayer& message, const StepShape& step, bool cross,
                         LayerPart& part) {
  const engine::ModelFacts& model = step.model;
  const Expected tokens =
      cross ? Expected{step.cross_tokens, kCrossTokens} : Expected{step.tokens, kTokens};
  const Expected heads{model.num_kv_heads, "num_kv_heads of the model"};
  part.key = checked<3>("key", *message.key, cross ? kCrossKeyDims : kKeyDims, model.dtype,
                        {tokens, heads, Expected{model.head_dim, "head_dim of the model"}});
  if (step.latent) return;
  part.value =
      checked<3>("value", *message.value, cross ? kCrossValueDims : kValueDims, model.dtype,
                 {tokens, heads, Expected{model.value_head_dim, "value_head_dim of the model"}});
}

void check_weights_of(const std::vector<std::uint32_t>& sessions, const StepShape& step) {
  if (!sessions.empty() && !step.gives_weights) {
    throw RequestError(
        Code::kFailedPrecondition,
        text("returns.weights_of: given ", sessions.size(),
             " of them; allowed: none, as the variant ", quoted(engine::kPagedVariant), " of ",
             step.model.name, " gives no weights: export it again"));
  }
  for (std::size_t at = 0; at < sessions.size(); ++at) {
    const std::uint32_t session = sessions[at];
    const auto field = [&] { return text("returns.weights_of[", at, "]"); };
    if (session >= step.keys.size()) {
      refuse(field(), std::to_string(session),
             text("0..", step.keys.size() - 1, ", the sessions of the step"));
    }
    if (at > 0 && session <= sessions[at - 1]) {
      refuse(field(), std::to_string(session), text("more than ", sessions[at - 1], ", before it"));
    }
  }
}

void plan_results(const wire::AttendLayer& message, const StepShape& step, const Limits& limits,
                  const Shape& of_output, LayerPart& part) {
  const engine::ModelFacts& model = step.model;
  const Shape rows{step.tokens, model.num_heads};
  Wide total = 0;
  const auto add = [&](bool asked, wire::LayerOutput output, DataType dtype, const Shape& shape) {
    if (!asked) return;
    Wide bytes = item_bytes(dtype);
    for (const std::int64_t size : shape.sizes()) bytes = times(bytes, size);
    total = plus(total, bytes);
    part.results.push_back({output, dtype, shape, static_cast<std::size_t>(bytes)});
  };
  add(!message.returns.no_output, wire::LayerOutput::kOutput, model.dtype, of_output);
  add(message.returns.log_sum_exp, wire::LayerOutput::kLogSumExp, DataType::kFp32, rows);
  add(message.returns.entropy, wire::LayerOutput::kEntropy, DataType::kFp32, rows);
  const bool cross = step.layers[message.layer].cross;
  check_weights_of(message.returns.weights_of, step);
  for (const std::int64_t session : message.returns.weights_of) {
    const auto at = static_cast<std::size_t>(session);
    const std::int64_t keys = (cross ? step.cross_keys : step.keys)[at];
    add(true, wire::LayerOutput::kWeights, DataType::kFp32,
        {step.starts[at + 1] - step.starts[at], model.num_heads, keys});
    part.weights_of.push_back(session);
  }
  if (part.results.empty()) refuse("returns", "nothing to return", "at least one thing");
  check_response_bytes(total, limits);
  part.response_bytes = static_cast<std::size_t>(total);
  if (!message.output_region) return;
  std::vector<std::size_t> sizes;
  for (const wire::LayerResult& result : part.results) sizes.push_back(result.byte_size);
  part.output_region = checked_output_region(*message.output_region, sizes);
}

void check_query(const wire::AttendLayer& message, const StepShape& step, const Limits& limits,
                 LayerPart& part) {
  const engine::ModelFacts& model = step.model;
  part.query = checked<3>(
      "query", *message.query, kQueryDims, model.dtype,
      {Expected{step.tokens, kTokens}, Expected{model.num_heads, "num_heads of the model"},
       Expected{model.head_dim, "head_dim of the model"}});
  plan_results(message, step, limits, {step.tokens, model.num_heads, model.value_head_dim}, part);
}

void check_hidden_states(const wire::AttendLayer& message, const StepShape& step,
                         const Limits& limits, LayerPart& part) {
  const engine::ModelFacts& model = step.model;
  part.hidden_states = checked<2>(
      "hidden_states", *message.hidden_states, kHiddenDims, model.dtype,
      {Expected{step.tokens, kTokens}, Expected{model.embed_dim, "embed_dim of the model"}});
  plan_results(message, step, limits, {step.tokens, model.embed_dim}, part);
}

}  // namespace

bool takes_key(const StepShape& step, const sessions::LayerSpec& layer) {
  if (step.model.kind == engine::Kind::kLayer || step.queries_only) return false;
  return !layer.cross || step.cross_tokens != 0;
}

LayerPart check_layer(const wire::AttendLayer& message, const StepShape& step,
                      const Limits& limits) {
  if (message.layer >= step.layers.size()) {
    refuse("layer", std::to_string(message.layer), text("0..", step.layers.size() - 1));
  }
  const sessions::LayerSpec& layer = step.layers[message.layer];
  const bool of_core = step.model.kind != engine::Kind::kLayer;
  if (of_core) {
    check_there(message, takes_key(step, layer), step.latent);
  } else {
    check_hidden_there(message);
  }
  LayerPart part;
  part.layer = message.layer;
  if (message.query) check_query(message, step, limits, part);
  if (message.hidden_states) check_hidden_states(message, step, limits, part);
  if (message.key) check_key_and_value(message, step, layer.cross, part);
  Wide total = 0;
  for (const auto* spec : {&part.query, &part.key, &part.value, &part.hidden_states}) {
    if (*spec) total = plus(total, (*spec)->byte_size);
  }
  check_request_bytes(total, limits);
  return part;
}

}  // namespace attnserve::requests
