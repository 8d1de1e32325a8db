#include "requests/infer.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <span>
#include <utility>

#include "base/status.h"
#include "base/text.h"
#include "requests/infer_parameters.h"
#include "requests/plan.h"
#include "requests/ports.h"
#include "requests/refusal.h"

namespace attnserve::requests {
namespace {

using wire::Input;
using wire::Output;

constexpr std::size_t kMostNamed = 80;  // characters of a wrong name that are repeated

constexpr std::string_view kDatatypes = "FP32, FP16, BF16, INT64, INT32, BOOL";

std::string field_of_tensor(std::string_view tensor, std::string_view part) {
  return text(first_characters(tensor, kMostShown), ".", part);
}

// Names that came before, each once: those that models have by their numbers.
class Names {
 public:
  explicit Names(std::string_view field) : field_(field) {}

  // Throws RequestError INVALID_ARGUMENT: it came before.
  template <class Number>
  void add(std::string_view name, std::optional<Number> number) {
    const bool first = number ? !std::exchange(known_[static_cast<std::size_t>(*number)], true)
                              : unknown_.insert(name).second;
    if (!first) refuse(field_, text(shown(name), " twice"), "each name once");
  }

 private:
  std::string_view field_;
  std::array<bool, std::max(wire::kInputs, wire::kOutputs)> known_{};
  std::set<std::string_view> unknown_;
};

// One output that was asked for, before it is known whether the model has it.
struct Wish {
  std::string_view name;
  std::optional<Output> output;  // none: no model has it
  std::optional<SharedPlaces::Place> place;
  const wire::Parameters* parameters;
};

std::vector<Wish> wishes_of(const wire::InferRequest& message, SharedPlaces& places) {
  std::vector<Wish> wishes;
  Names names("outputs");
  static const wire::Parameters kNone;
  for (const wire::InferOutput& output : message.outputs) {
    const std::optional<Output> known = wire::output_of_name(output.name);
    names.add(output.name, known);
    // Triton would answer something else than the tensor.
    if (find(output.parameters, "classification") != nullptr) {
      refuse(field_of_tensor(output.name, "parameters"), "'classification'",
             "shared_memory_region, shared_memory_byte_size, shared_memory_offset");
    }
    wishes.push_back({output.name, known, places.find_place(output.name, output.parameters),
                      &output.parameters});
  }
  if (wishes.empty()) wishes.push_back({"output", Output::kOutput, std::nullopt, &kNone});
  return wishes;
}

// The inputs of a request, for the names that any model has.
struct Inputs {
  std::array<const wire::InferInput*, wire::kInputs> tensors{};
  std::array<ByteSpan, wire::kInputs> elements{};
  std::array<bool, wire::kInputs> shared{};
  std::optional<std::string_view> unknown;  // the first name that no model has
};

std::string_view contents_field(DataType datatype) {
  switch (datatype) {
    case DataType::kFp32:
      return "fp32_contents";
    case DataType::kInt64:
      return "int64_contents";
    case DataType::kInt32:
      return "int_contents";
    case DataType::kBool:
      return "bool_contents";
    default:
      return {};
  }
}

void check_contents(const wire::InferInput& tensor, DataType datatype) {
  const std::vector<std::string_view>& given = tensor.contents->fields;
  std::string list;
  for (const std::string_view name : given) {
    if (!list.empty()) list += ", ";
    list += quoted(name);
  }
  list = text('[', list, ']');
  const std::string_view wanted = contents_field(datatype);
  if (wanted.empty()) {
    refuse(field_of_tensor(tensor.name, "contents"), list,
           text("raw_input_contents: ", tensor.datatype, " travels raw"));
  }
  if (given.size() != 1 || given[0] != wanted) {
    refuse(field_of_tensor(tensor.name, "contents"), given.empty() ? "nothing" : list,
           text(wanted, " for ", tensor.datatype));
  }
}

[[noreturn]] void refuse_count(const wire::InferRequest& message) {
  const auto wanted = std::ranges::count_if(message.inputs, [](const wire::InferInput& tensor) {
    return !tensor.contents && find(tensor.parameters, kSharedMemoryParameters[0]) == nullptr;
  });
  refuse("raw_input_contents", std::to_string(message.raw_input_contents.size()),
         text(wanted, ", one for each input that has neither contents nor shared memory"));
}

Inputs inputs_of(const wire::InferRequest& message, SharedPlaces& places) {
  Inputs inputs;
  Names names("inputs");
  const std::vector<ByteSpan>& raw = message.raw_input_contents;
  std::size_t used = 0;
  for (const wire::InferInput& tensor : message.inputs) {
    const std::optional<Input> input = wire::input_of_name(tensor.name);
    names.add(tensor.name, input);
    const DataType datatype = data_type_of(tensor.datatype);
    if (datatype == DataType::kUnspecified) {
      refuse(field_of_tensor(tensor.name, "datatype"), shown(tensor.datatype), kDatatypes);
    }
    const std::optional<SharedPlaces::Place> place =
        places.find_place(tensor.name, tensor.parameters);
    if (tensor.contents && (!raw.empty() || place)) {
      refuse(field_of_tensor(tensor.name, "contents"),
             text("elements, and ", raw.empty() ? "shared memory" : "raw_input_contents"),
             "one of them");
    }
    ByteSpan elements;
    if (place) {
      elements = place->bytes;
    } else if (tensor.contents) {
      check_contents(tensor, datatype);
      elements = tensor.contents->elements.span();
    } else {
      if (used == raw.size()) refuse_count(message);
      elements = raw[used++];
    }
    if (!input) {
      if (!inputs.unknown) inputs.unknown = tensor.name;
      continue;
    }
    const auto at = static_cast<std::size_t>(*input);
    inputs.tensors[at] = &tensor;
    inputs.elements[at] = elements;
    inputs.shared[at] = place.has_value();
  }
  if (used != raw.size()) refuse_count(message);
  return inputs;
}

// Copies what the plan may not look at where it is. Sizes are checked by now.
void copy_fleeting(Inputs& inputs, std::vector<Bytes>& copies) {
  for (std::size_t at = 0; at < wire::kInputs; ++at) {
    if (inputs.tensors[at] == nullptr) continue;
    // Gathered elements are the decoded message's, which the plan outlives. And kernels trust
    // lengths that were checked, while the caller's memory may change after that.
    const bool lengths = at == static_cast<std::size_t>(Input::kKeyLengths);
    if (!inputs.tensors[at]->contents && !(lengths && inputs.shared[at])) continue;
    Bytes copy = Bytes::allocate(inputs.elements[at].size());
    std::memcpy(copy.data(), inputs.elements[at].data(), copy.size());
    copies.push_back(std::move(copy));
    inputs.elements[at] = copies.back().span();
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

InferPlan plan_infer(const wire::InferRequest& message, engine::ModelPtr model,
                     const Context& context, std::string_view peer) {
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
  plan.attend = plan_for(std::move(model), request, context, false);
  for (std::size_t at = 0; at < wire::kInputs; ++at) {
    if (inputs.shared[at]) plan.attend.sent_bytes -= inputs.elements[at].size();
  }
  copy_fleeting(inputs, plan.contents);
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

void InferPlan::check_intact() const {
  for (const sessions::RegionView& region : regions) region.check_intact();
}

}  // namespace attnserve::requests
