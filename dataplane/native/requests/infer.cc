#include "requests/infer.h"

#include <algorithm>
#include <span>
#include <utility>

#include "base/copy.h"
#include "base/status.h"
#include "base/text.h"
#include "requests/infer_parameters.h"
#include "requests/infer_tensors.h"
#include "requests/plan.h"
#include "requests/ports.h"
#include "requests/refusal.h"

namespace attnserve::requests {
namespace {

using wire::Input;
using wire::Output;

constexpr std::size_t kMostNamed = 80;  // characters of a wrong name that are repeated

// Gathered elements are the decoded message's, which the plan outlives: they come with their
// charge, and stay where they are.
void take_contents(wire::InferRequest& message, std::vector<Bytes>& memory) {
  for (wire::InferInput& tensor : message.inputs) {
    if (tensor.contents) memory.push_back(std::move(tensor.contents->elements));
  }
}

// Kernels trust lengths that were checked, while the caller's memory may change after that. Sizes
// are checked by now.
void copy_shared_lengths(Inputs& inputs, std::vector<Bytes>& memory) {
  for (const Input input :
       {Input::kKeyLengths, Input::kPrefixLengths, Input::kCuSeqlensQ, Input::kCuSeqlensK}) {
    const auto at = static_cast<std::size_t>(input);
    if (inputs.tensors[at] == nullptr || !inputs.shared[at]) continue;
    Bytes copy = Bytes::allocate(inputs.elements[at].size());
    copy_bytes(copy.data(), inputs.elements[at].data(), copy.size());
    memory.push_back(std::move(copy));
    inputs.elements[at] = memory.back().span();
  }
}

bool wishes_for(std::span<const Wish> wishes, Output output) {
  return std::ranges::any_of(wishes, [&](const Wish& wish) { return wish.output == output; });
}

// A count goes with the outputs that need it.
void check_count(std::string_view parameter, std::uint32_t count, bool used,
                 std::string_view outputs) {
  if (used && count == 0) {
    refuse_parameter(parameter, "'nothing'", text("1 or more with output ", outputs));
  }
  if (count != 0 && !used) {
    refuse_parameter(parameter, std::to_string(count), text("nothing without output ", outputs));
  }
}

wire::ReturnOptions returns_of(std::span<const Wish> wishes, const InferOptions& options,
                               const engine::Model& model) {
  std::optional<std::string_view> unknown;
  for (const Wish& wish : wishes) {
    if (!wish.output && (!unknown || wish.name < *unknown)) unknown = wish.name;
  }
  if (unknown) {
    refuse("outputs", quoted(first_characters(*unknown, kMostNamed)),
           text(output_names(model), " for ", model.facts.name));
  }
  check_count("top_k", options.top_k,
              wishes_for(wishes, Output::kTopKIndices) || wishes_for(wishes, Output::kTopKWeights),
              "top_k_indices or top_k_weights");
  check_count("mass_by_distance", options.mass_by_distance,
              wishes_for(wishes, Output::kMassByDistance), "mass_by_distance");
  wire::ReturnOptions returns;
  returns.no_output = !wishes_for(wishes, Output::kOutput);
  returns.weights = wishes_for(wishes, Output::kWeights);
  returns.entropy = wishes_for(wishes, Output::kEntropy);
  returns.top_k = options.top_k;
  returns.mass_per_key = wishes_for(wishes, Output::kMassPerKey);
  returns.mass_by_distance = options.mass_by_distance;
  returns.log_sum_exp = wishes_for(wishes, Output::kLogSumExp);
  return returns;
}

// The request as `Attend` would have it.
wire::AttendRequest attend_request(const Inputs& inputs, std::span<const Wish> wishes,
                                   const InferOptions& options, const engine::Model& model) {
  wire::AttendRequest request;
  request.variant = options.variant;
  request.priority = options.priority;
  request.scale = options.scale;
  request.softcap = options.softcap;
  if (inputs.unknown) {
    refuse("inputs", quoted(first_characters(*inputs.unknown, kMostNamed)),
           text(input_names(model), " for ", model.facts.name));
  }
  for (std::size_t at = 0; at < wire::kInputs; ++at) {
    const wire::InferInput* tensor = inputs.tensors[at];
    if (tensor == nullptr) continue;
    wire::TensorMessage& header = request.tensors[at].emplace();
    header.dtype = static_cast<std::int32_t>(data_type_of(tensor->datatype));
    header.shape = tensor->shape;
    header.content = wire::TensorMessage::Content::kData;
    header.data = inputs.elements[at];
  }
  request.returns = returns_of(wishes, options, model);
  return request;
}

AskedOutput asked_output(const AttendPlan& plan, Wish& wish) {
  AskedOutput asked;
  const auto result = std::ranges::find(plan.results, *wish.output, &wire::ResultSpec::output);
  asked.result = static_cast<std::size_t>(result - plan.results.begin());
  if (!wish.place) return asked;
  asked.region = std::move(wish.place->region);
  asked.place = wish.place->bytes;
  for (const std::string_view name : kSharedMemoryParameters) {
    if (const wire::ParameterValue* value = find(*wish.parameters, name)) {
      asked.parameters.emplace_back(name, *value);
    }
  }
  return asked;
}

// An answer that goes into one message.
void check_answer_size(std::size_t size, const Limits& limits) {
  if (size <= limits.max_message_bytes) return;
  throw RequestError(
      Code::kResourceExhausted,
      text("response size: its tensors take ", size,
           " bytes; allowed in one message: ", limits.max_message_bytes,
           " (--max-message-mib); have the outputs put into shared memory, or use AttendStream"));
}

}  // namespace

InferPlan plan_infer(wire::InferRequest& message, engine::ModelPtr model, const Context& context,
                     std::string_view peer) {
  if (model->facts.kind == engine::Kind::kTransformer) {
    throw RequestError(
        Code::kFailedPrecondition,
        text("model_name: ", model->facts.name, " is a transformer and takes no such tensors"));
  }
  InferPlan plan;
  SharedPlaces places(context.regions, peer, plan.regions);
  std::vector<Wish> wishes = wishes_of(message, places);
  Inputs inputs = inputs_of(message, places);
  const InferOptions options = options_of(message.parameters);
  const wire::AttendRequest request = attend_request(inputs, wishes, options, *model);
  plan.attend = plan_for(std::move(model), request, context, peer, false);
  for (std::size_t at = 0; at < wire::kInputs; ++at) {
    if (inputs.shared[at]) plan.attend.sent_bytes -= inputs.elements[at].size();
  }
  take_contents(message, plan.memory);
  copy_shared_lengths(inputs, plan.memory);
  plan.elements = inputs.elements;
  plan.timeout = options.timeout;
  plan.outputs.reserve(wishes.size());
  for (Wish& wish : wishes) plan.outputs.push_back(asked_output(plan.attend, wish));
  if (std::ranges::none_of(plan.outputs,
                           [](const AskedOutput& o) { return o.region.has_value(); })) {
    check_answer_size(plan.attend.response_bytes, context.limits);
  }
  return plan;
}

std::vector<wire::InferResult> answer_outputs(const InferPlan& plan, const Limits& limits) {
  std::vector<wire::InferResult> outputs;
  outputs.reserve(plan.outputs.size());
  std::size_t inside = 0;
  for (const AskedOutput& asked : plan.outputs) {
    const wire::ResultSpec& result = plan.attend.results[asked.result];
    wire::InferResult output;
    output.name = name_of(result.output);
    output.datatype = name_of(result.dtype);
    output.shape = result.shape;
    output.byte_size = result.byte_size;
    if (asked.region) {
      if (asked.region->byte_size < result.byte_size) {
        refuse(text(output.name, ".shared_memory_byte_size"),
               text(asked.region->byte_size, " bytes"),
               text("at least ", result.byte_size, " bytes, as shape ",
                    list_text(result.shape.sizes()), " takes"));
      }
      output.shared = true;
      output.parameters = asked.parameters;
      for (auto& [name, value] : output.parameters) {
        if (name == kSharedMemoryParameters[1]) {
          value = static_cast<std::int64_t>(result.byte_size);
        }
      }
    } else {
      inside += result.byte_size;
    }
    outputs.push_back(std::move(output));
  }
  check_answer_size(inside, limits);
  return outputs;
}

}  // namespace attnserve::requests
