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

using Dims = std::array<std::string_view, 3>;
constexpr Dims kQueryDims{"T", "H", "D"};
constexpr Dims kKeyDims{"T", "Hkv", "D"}, kValueDims{"T", "Hkv", "Dv"};
constexpr Dims kCrossKeyDims{"C", "Hkv", "D"}, kCrossValueDims{"C", "Hkv", "Dv"};
constexpr std::string_view kTokens = "T, the new_tokens of all sessions of the step";
constexpr std::string_view kCrossTokens = "C, the cross_tokens of all sessions of the step";

struct Expected {
  std::int64_t size;
  std::string_view what;
};

TensorSpec checked(std::string_view field, const wire::TensorMessage& message, const Dims& dims,
                   DataType dtype, const std::array<Expected, 3>& shape) {
  TensorSpec spec = check_tensor(TensorRule{field, dtype, dims}, message, false, nullptr);
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    if (spec.shape[axis] == shape[axis].size) continue;
    refuse(text(field, ".shape"), list_text(spec.shape.sizes()),
           text(shape[axis].size, " at axis ", axis, " (", shape[axis].what, ")"));
  }
  return spec;
}

void check_there(const wire::AttendLayer& message, bool with_key) {
  if (message.hidden_states) {
    refuse("hidden_states", "a tensor", "nothing for a core model: query, key and value");
  }
  if (!message.returns.weights_of.empty()) {
    refuse("returns.weights_of", text(message.returns.weights_of.size(), " of them"),
           "none: this server does not return them");
  }
  if (!message.query && !message.key && !message.value) {
    refuse("query", "nothing",
           with_key ? "query, key and value, or one part of them" : "[T, H, D]");
  }
  if (!with_key && (message.key || message.value)) {
    refuse(message.key ? "key" : "value", "a tensor",
           text("nothing for layer ", message.layer, ", a cross layer, as cross_tokens is 0"));
  }
  if (message.key.has_value() != message.value.has_value()) {
    refuse(message.key ? "value" : "key", "nothing", "both key and value, or neither");
  }
}

void check_key_and_value(const wire::AttendLayer& message, const StepShape& step, bool cross,
                         LayerPart& part) {
  const engine::ModelFacts& model = step.model;
  const Expected tokens =
      cross ? Expected{step.cross_tokens, kCrossTokens} : Expected{step.tokens, kTokens};
  const Expected heads{model.num_kv_heads, "num_kv_heads of the model"};
  part.key = checked("key", *message.key, cross ? kCrossKeyDims : kKeyDims, model.dtype,
                     {tokens, heads, Expected{model.head_dim, "head_dim of the model"}});
  part.value =
      checked("value", *message.value, cross ? kCrossValueDims : kValueDims, model.dtype,
              {tokens, heads, Expected{model.value_head_dim, "value_head_dim of the model"}});
}

void check_query(const wire::AttendLayer& message, const StepShape& step, const Limits& limits,
                 LayerPart& part) {
  const engine::ModelFacts& model = step.model;
  part.query =
      checked("query", *message.query, kQueryDims, model.dtype,
              {Expected{step.tokens, kTokens}, Expected{model.num_heads, "num_heads of the model"},
               Expected{model.head_dim, "head_dim of the model"}});
  const Shape rows{step.tokens, model.num_heads};
  Wide total = 0;
  const auto add = [&](bool asked, wire::LayerOutput output, DataType dtype, const Shape& shape) {
    if (!asked) return;
    Wide bytes = item_bytes(dtype);
    for (const std::int64_t size : shape.sizes()) bytes = times(bytes, size);
    total = plus(total, bytes);
    part.results.push_back({output, dtype, shape, static_cast<std::size_t>(bytes)});
  };
  add(!message.returns.no_output, wire::LayerOutput::kOutput, model.dtype,
      {step.tokens, model.num_heads, model.value_head_dim});
  add(message.returns.log_sum_exp, wire::LayerOutput::kLogSumExp, DataType::kFp32, rows);
  add(message.returns.entropy, wire::LayerOutput::kEntropy, DataType::kFp32, rows);
  if (part.results.empty()) refuse("returns", "nothing to return", "at least one thing");
  check_response_bytes(total, limits);
  part.response_bytes = static_cast<std::size_t>(total);
  if (!message.output_region) return;
  std::vector<std::size_t> sizes;
  for (const wire::LayerResult& result : part.results) sizes.push_back(result.byte_size);
  part.output_region = checked_output_region(*message.output_region, sizes);
}

}  // namespace

bool takes_key(const StepShape& step, const sessions::LayerSpec& layer) {
  return !layer.cross || step.cross_tokens != 0;
}

LayerPart check_layer(const wire::AttendLayer& message, const StepShape& step,
                      const Limits& limits) {
  if (message.layer >= step.layers.size()) {
    refuse("layer", std::to_string(message.layer), text("0..", step.layers.size() - 1));
  }
  const sessions::LayerSpec& layer = step.layers[message.layer];
  check_there(message, takes_key(step, layer));
  LayerPart part;
  part.layer = message.layer;
  if (message.query) check_query(message, step, limits, part);
  if (message.key) check_key_and_value(message, step, layer.cross, part);
  Wide total = 0;
  for (const auto* spec : {&part.query, &part.key, &part.value}) {
    if (*spec) total = plus(total, (*spec)->byte_size);
  }
  check_request_bytes(total, limits);
  return part;
}

}  // namespace attnserve::requests
