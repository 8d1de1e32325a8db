// Requests of the Open Inference Protocol, read as protobuf reads them.
#include <bit>
#include <map>

#include "wire/contents.h"
#include "wire/fields.h"
#include "wire/open_inference.h"

namespace attnserve::wire {

namespace {

void merge(FieldReader reader, ParameterValue& value) {
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        value = reader.flag();
        break;
      case varint_field(2):
        value = static_cast<std::int64_t>(reader.number());
        break;
      case bytes_field(3):
        value = reader.text();
        break;
      case fixed64_field(4):
        value = std::bit_cast<double>(reader.number());
        break;
      case varint_field(5):
        value = reader.number();
        break;
    }
  }
}

// A map field under way: finds names in little time, however many and however long they are.
class ParameterMap {
 public:
  explicit ParameterMap(Parameters& parameters) : parameters_(parameters) {}

  void add(FieldReader entry) {
    std::string_view name;
    ParameterValue value;
    while (entry.next()) {
      if (entry.key() == bytes_field(1)) name = entry.text();
      if (entry.key() == bytes_field(2)) merge(entry.message(), value);
    }
    const auto [found, is_new] = places_.try_emplace(name, parameters_.size());
    if (is_new) {
      parameters_.emplace_back(name, value);
    } else {
      parameters_[found->second].second = value;
    }
  }

 private:
  Parameters& parameters_;
  std::map<std::string_view, std::size_t> places_;
};

InferInput read_input(FieldReader reader, ByteBudget* budget) {
  InferInput input;
  ParameterMap parameters(input.parameters);
  std::optional<ContentsReader> contents;
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        input.name = reader.text();
        break;
      case bytes_field(2):
        input.datatype = reader.text();
        break;
      case varint_field(3):
        input.shape.push_back(static_cast<std::int64_t>(reader.number()));
        break;
      case bytes_field(3):
        append_packed(reader, "a shape of too many dimensions", input.shape);
        break;
      case bytes_field(4):
        parameters.add(reader.message());
        break;
      case bytes_field(5):
        if (!contents) contents.emplace();
        contents->add(reader.bytes(), reader.message(ContentsReader::kUncounted));
        break;
    }
  }
  if (contents) input.contents = contents->gather(budget);
  return input;
}

InferOutput read_output(FieldReader reader) {
  InferOutput output;
  ParameterMap parameters(output.parameters);
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        output.name = reader.text();
        break;
      case bytes_field(2):
        parameters.add(reader.message());
        break;
    }
  }
  return output;
}

}  // namespace

InferRequest decode_infer(ByteSpan message, std::string_view method, ByteBudget* budget) {
  Decoding decoding(method);
  InferRequest request;
  ParameterMap parameters(request.parameters);
  for (FieldReader reader(message, decoding); reader.next();) {
    switch (reader.key()) {
      case bytes_field(1):
        request.model_name = reader.text();
        break;
      case bytes_field(2):
        request.model_version = reader.text();
        break;
      case bytes_field(3):
        request.id = reader.text();
        break;
      case bytes_field(4):
        parameters.add(reader.message());
        break;
      case bytes_field(5):
        request.inputs.push_back(read_input(reader.message(), budget));
        break;
      case bytes_field(6):
        request.outputs.push_back(read_output(reader.message()));
        break;
      case bytes_field(7):
        request.raw_input_contents.push_back(reader.bytes());
        break;
    }
  }
  return request;
}

}  // namespace attnserve::wire
