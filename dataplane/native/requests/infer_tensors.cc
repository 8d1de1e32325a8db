#include "requests/infer_tensors.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "base/tensor.h"
#include "base/text.h"
#include "requests/refusal.h"

namespace attnserve::requests {
namespace {

using wire::Input;
using wire::Output;

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

}  // namespace

std::vector<Wish> wishes_of(const wire::InferRequest& message, SharedPlaces& places) {
  std::vector<Wish> wishes;
  Names names("outputs");
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
  if (wishes.empty()) wishes.push_back({"output", Output::kOutput, std::nullopt, nullptr});
  return wishes;
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

}  // namespace attnserve::requests
