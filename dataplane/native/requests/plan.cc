#include "requests/plan.h"

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/status.h"
#include "base/text.h"
#include "requests/options.h"
#include "requests/refusal.h"
#include "requests/sizes.h"
#include "requests/tensor_spec.h"
#include "requests/variants.h"

namespace attnserve::requests {
namespace {

using wire::Input;

constexpr std::size_t index(Input input) { return static_cast<std::size_t>(input); }

const std::optional<TensorSpec>& at(const TensorSpecs& specs, Input input) {
  return specs[index(input)];
}

// The dimensions of each input, by wire::Input: the letters of attention.proto.
constexpr std::array<std::string_view, 4> kQueryDims{"B", "H", "Sq", "D"};
constexpr std::array<std::string_view, 4> kKeyDims{"B", "Hkv", "Sk", "D"};
constexpr std::array<std::string_view, 4> kValueDims{"B", "Hkv", "Sk", "Dv"};
constexpr std::array<std::string_view, 3> kHiddenStatesDims{"B", "Sq", "E"};
constexpr std::array<std::string_view, 3> kContextDims{"B", "Sk", "E"};
constexpr std::array<std::string_view, 1> kKeyLengthsDims{"B"};
constexpr std::array<std::string_view, 4> kBiasDims{"1 or B", "1 or H", "1 or Sq", "1 or Sk"};
constexpr std::array<std::string_view, 1> kSinksDims{"H"};
constexpr std::array<std::string_view, 1> kPrefixLengthsDims{"B, or N if packed"};
constexpr std::array<std::string_view, 1> kStartsDims{"N + 1"};
constexpr std::array<std::span<const std::string_view>, wire::kInputs> kDims{
    kQueryDims, kKeyDims,   kValueDims,         kHiddenStatesDims, kContextDims, kKeyLengthsDims,
    kBiasDims,  kSinksDims, kPrefixLengthsDims, kStartsDims,       kStartsDims};

// Those that say who sees whom, and how much: never needed, and INT64 but for the bias and the
// sinks.
constexpr bool masks(Input input) { return input >= Input::kKeyLengths; }

bool required(const engine::Model& model, Input input) {
  switch (input) {
    case Input::kQuery:
    case Input::kKey:
    case Input::kValue:
      return model.facts.kind == engine::Kind::kCore;
    case Input::kHiddenStates:
      return model.facts.kind == engine::Kind::kLayer;
    case Input::kContext:
      return model.facts.kind == engine::Kind::kLayer && model.facts.context_dim.has_value();
    default:
      return false;
  }
}

std::string required_names(const engine::Model& model) {
  std::string names;
  for (std::size_t number = 0; number < wire::kInputs; ++number) {
    const auto input = static_cast<Input>(number);
    if (!required(model, input)) continue;
    if (!names.empty()) names += ", ";
    names += name_of(input);
  }
  return names;
}

// Each tensor of the request, checked on its own.
TensorSpecs checked_specs(const wire::AttendRequest& message, const engine::Model& model,
                          const sessions::StoredOf& stored, bool chunks_allowed) {
  const engine::ModelFacts& facts = model.facts;
  if (facts.kind == engine::Kind::kTransformer) {
    throw RequestError(
        Code::kFailedPrecondition,
        text("model: ", facts.name, " is a transformer and takes tokens; use AttendTokens"));
  }
  TensorSpecs specs;
  for (std::size_t number = 0; number < wire::kInputs; ++number) {
    const auto input = static_cast<Input>(number);
    const std::optional<wire::TensorMessage>& tensor = message.tensors[number];
    const bool always = required(model, input);
    if (!tensor) {
      if (!always) continue;
      refuse(name_of(input), "nothing",
             text(dims_text(kDims[number]), " for ", name_of(facts.kind), " models"));
    }
    if (!always && !masks(input)) {
      refuse(name_of(input), "a tensor", text(required_names(model), " for model ", facts.name));
    }
    TensorRule rule{name_of(input), facts.dtype, kDims[number]};
    if (input == Input::kBias) {
      rule.also = DataType::kBool;
    } else if (input == Input::kSinks) {
      rule.dtype = DataType::kFp32;
    } else if (masks(input)) {
      rule.dtype = DataType::kInt64;
    }
    specs[number] = check_tensor(rule, *tensor, chunks_allowed, &stored);
  }
  return specs;
}

engine::Dims dims_of(const engine::Model& model, const TensorSpecs& specs) {
  engine::Dims dims;
  dims.num_heads = model.facts.num_heads;
  if (const auto& query = at(specs, Input::kQuery)) {
    dims.batch = query->shape[0];
    dims.query_len = query->shape[2];
    dims.key_len = at(specs, Input::kKey)->shape[2];
  } else {
    const auto& hidden_states = at(specs, Input::kHiddenStates);
    const auto& context = at(specs, Input::kContext);
    dims.batch = hidden_states->shape[0];
    dims.query_len = hidden_states->shape[1];
    dims.key_len = (context ? context : hidden_states)->shape[1];
  }
  if (const auto& starts = at(specs, Input::kCuSeqlensQ)) dims.packed = starts->shape[0] - 1;
  return dims;
}

// Packed sequences: one row of the batch, in which they lie by their starts.
void check_packed(const TensorSpecs& specs, const engine::Dims& dims) {
  const auto& queries = at(specs, Input::kCuSeqlensQ);
  const auto& keys = at(specs, Input::kCuSeqlensK);
  if (keys && !queries) refuse("cu_seqlens_k", "a tensor", "nothing without cu_seqlens_q");
  if (!queries) return;
  if (queries->shape[0] < 2) {
    refuse("cu_seqlens_q.shape", list_text(queries->shape.sizes()), "[N + 1], N at least 1");
  }
  if (at(specs, Input::kKeyLengths)) {
    refuse("key_lengths", "a tensor", "nothing with cu_seqlens_q, which says where sequences end");
  }
  if (dims.batch != 1) {
    refuse("batch B", std::to_string(dims.batch), "1 with cu_seqlens_q: sequences lie in one row");
  }
  if (keys && keys->shape[0] != queries->shape[0]) {
    refuse("cu_seqlens_k.shape", list_text(keys->shape.sizes()),
           text(list_text(queries->shape.sizes()), ", as cu_seqlens_q has"));
  }
  if (!keys && dims.query_len != dims.key_len) {
    refuse("cu_seqlens_k", "nothing", "[N + 1] where Sq and Sk differ");
  }
}

void check_limits(const engine::Dims& dims, const Limits& limits) {
  if (dims.batch > limits.max_batch) {
    refuse("batch B", std::to_string(dims.batch), text("1..", limits.max_batch));
  }
  if (dims.query_len > limits.max_seq_len) {
    refuse("length Sq", std::to_string(dims.query_len), text("1..", limits.max_seq_len));
  }
  if (dims.key_len > limits.max_seq_len) {
    refuse("length Sk", std::to_string(dims.key_len), text("1..", limits.max_seq_len));
  }
}

// Compares the size at one axis of a tensor, if it is there.
void expect(const TensorSpecs& specs, Input input, std::size_t axis, std::int64_t size,
            std::string_view what) {
  const std::optional<TensorSpec>& spec = at(specs, input);
  if (!spec || spec->shape[axis] == size) return;
  refuse(text(name_of(input), ".shape"), list_text(spec->shape.sizes()),
         text(size, " at axis ", axis, " (", what, ")"));
}

// Compares the tensors' shapes with the model and with each other.
void check_shapes(const engine::Model& model, const TensorSpecs& specs, const engine::Dims& dims) {
  const engine::ModelFacts& facts = model.facts;
  constexpr std::string_view kBatch = "batch B, as the first tensor has";
  constexpr std::string_view kKvHeads = "num_kv_heads of the model";
  constexpr std::string_view kHeadDim = "head_dim of the model";
  expect(specs, Input::kQuery, 1, facts.num_heads, "num_heads of the model");
  expect(specs, Input::kQuery, 3, facts.head_dim, kHeadDim);
  expect(specs, Input::kKey, 0, dims.batch, kBatch);
  expect(specs, Input::kKey, 1, facts.num_kv_heads, kKvHeads);
  expect(specs, Input::kKey, 3, facts.head_dim, kHeadDim);
  expect(specs, Input::kValue, 0, dims.batch, kBatch);
  expect(specs, Input::kValue, 1, facts.num_kv_heads, kKvHeads);
  expect(specs, Input::kValue, 2, dims.key_len, "Sk, as key has");
  expect(specs, Input::kValue, 3, facts.value_head_dim, "value_head_dim of the model");
  expect(specs, Input::kHiddenStates, 2, facts.embed_dim, "embed_dim of the model");
  expect(specs, Input::kContext, 0, dims.batch, kBatch);
  expect(specs, Input::kContext, 2, facts.context_dim.value_or(0), "context_dim of the model");
  expect(specs, Input::kKeyLengths, 0, dims.batch, kBatch);
  expect(specs, Input::kSinks, 0, facts.num_heads, "num_heads of the model");
  check_packed(specs, dims);
  expect(specs, Input::kPrefixLengths, 0, dims.sequences(),
         dims.packed > 0 ? "sequences N of cu_seqlens_q" : kBatch);
  if (const auto& bias = at(specs, Input::kBias)) {
    const std::array<std::int64_t, 4> full{dims.batch, dims.num_heads, dims.query_len,
                                           dims.key_len};
    for (std::size_t axis = 0; axis < full.size(); ++axis) {
      if (bias->shape[axis] == 1 || bias->shape[axis] == full[axis]) continue;
      refuse("bias.shape", list_text(bias->shape.sizes()),
             text("1 or the full size at each axis of ", list_text(full)));
    }
  }
}

std::size_t sent_bytes(const TensorSpecs& specs) {
  std::size_t bytes = 0;
  for (const std::optional<TensorSpec>& spec : specs) {
    if (spec && spec->sent()) bytes += spec->byte_size;
  }
  return bytes;
}

}  // namespace

bool joinable(const TensorSpecs& specs, const engine::Dims& dims) {
  return !at(specs, Input::kBias) && !at(specs, Input::kSinks) && dims.packed == 0;
}

AttendPlan plan_attend(const wire::AttendRequest& message, const Context& context,
                       std::string_view peer, bool chunks_allowed) {
  if (message.model.empty()) refuse("model", "nothing", "a name that ListModels gives");
  return plan_for(context.models.get(message.model, message.version), message, context, peer,
                  chunks_allowed);
}

AttendPlan plan_for(engine::ModelPtr model, const wire::AttendRequest& message,
                    const Context& context, std::string_view peer, bool chunks_allowed) {
  const Limits& limits = context.limits;
  AttendPlan plan;
  plan.specs = checked_specs(message, *model, {context.stored, sessions::name_of_caller(peer)},
                             chunks_allowed);
  plan.dims = dims_of(*model, plan.specs);
  check_limits(plan.dims, limits);
  plan.request_bytes = checked_request_bytes(plan.specs, limits);
  check_shapes(*model, plan.specs, plan.dims);
  const ScoreOptions score = checked_score_options(message, *model);
  plan.query_factor = score.query_factor;
  plan.softcap = score.softcap;
  plan.wanted = checked_wanted(message.returns, plan.dims);
  const Graphs graphs = chosen_graphs(*model, message.variant, plan.specs, plan.softcap.has_value(),
                                      plan.wanted, plan.dims);
  plan.variant = graphs.variant;
  plan.diagnosis = graphs.diagnosis;

  const auto& hidden_states = at(plan.specs, Input::kHiddenStates);
  Results results = checked_results(*model, hidden_states ? &hidden_states->shape : nullptr,
                                    plan.dims, plan.wanted, limits);
  plan.results = std::move(results.specs);
  plan.response_bytes = results.byte_size;
  plan.sent_bytes = sent_bytes(plan.specs);
  const std::size_t tensor_bytes =
      std::min(std::numeric_limits<std::size_t>::max() - plan.request_bytes, plan.response_bytes) +
      plan.request_bytes;
  plan.working_bytes =
      checked_working_bytes(*model, *plan.variant, plan.dims, tensor_bytes, limits);
  if (plan.diagnosis != nullptr) {
    const std::size_t mask = without_padding_bytes(*model, plan.specs, plan.dims);
    const std::size_t with_mask =
        std::min(std::numeric_limits<std::size_t>::max() - mask, tensor_bytes) + mask;
    plan.working_bytes =
        std::max(plan.working_bytes,
                 checked_working_bytes(*model, *plan.diagnosis, plan.dims, with_mask, limits));
  }
  plan.model = std::move(model);
  if (takes(plan, engine::Feed::kSoftcap)) softcap_feed(plan);
  plan.key = engine::batch_key(*plan.model, *plan.variant, plan.diagnosis, plan.wanted, plan.dims,
                               plan.softcap, !joinable(plan.specs, plan.dims));
  plan.priority = checked_priority(message.priority);
  if (message.output_region) {
    plan.output_region = checked_output_region(*message.output_region, plan.results);
  }
  return plan;
}

bool takes(const AttendPlan& plan, engine::Feed feed) {
  const std::string_view name = name_of(feed);
  return plan.variant->session->takes(name) ||
         (plan.diagnosis != nullptr && plan.diagnosis->session->takes(name));
}

float softcap_feed(const AttendPlan& plan) {
  if (plan.softcap) return *plan.softcap;
  const engine::Variant& variant = *plan.variant;
  constexpr float kOwn = -1.0F;  // the model's own, which the graph knows
  if (variant.facts.native || !variant.session->takes("softcap")) return kOwn;
  // `softcap` asked for by name; it divides by what it is given.
  const double own = plan.model->facts.softcap;
  if (own == 0) {
    refuse("softcap", "none", text("a number above 0 with variant ", quoted(variant.name())));
  }
  return static_cast<float>(own);
}

}  // namespace attnserve::requests
