// Answers of the Open Inference Protocol.
#include "wire/fields.h"
#include "wire/layout.h"
#include "wire/open_inference.h"

namespace attnserve::wire {

namespace {

using protozero::pbf_writer;

constexpr std::uint32_t kErrorMessage = 1, kInferResponse = 2;            // of the stream's answer
constexpr std::uint32_t kParameters = 4, kOutputs = 5, kRawContents = 6;  // of ModelInferResponse
constexpr std::uint32_t kOutputParameters = 4;                            // of InferOutputTensor
constexpr std::uint32_t kPadding = 1000;                                  // of nothing
constexpr std::string_view kFinalResponse = "triton_final_response";

// Writes an InferParameter: of a oneof, zeros too.
struct ValueWriter {
  pbf_writer& writer;

  void operator()(std::monostate) const {}
  void operator()(bool value) const { writer.add_bool(1, value); }
  void operator()(std::int64_t value) const { writer.add_int64(2, value); }
  void operator()(std::string_view value) const { writer.add_string(3, view_of(value)); }
  void operator()(double value) const { writer.add_double(4, value); }
  void operator()(std::uint64_t value) const { writer.add_uint64(5, value); }
};

void append_parameter(std::string& to, std::uint32_t number, std::string_view name,
                      const ParameterValue& value) {
  std::string choice;
  pbf_writer choice_writer(choice);
  std::visit(ValueWriter{choice_writer}, value);
  std::string entry;
  pbf_writer entry_writer(entry);
  entry_writer.add_string(1, view_of(name));
  entry_writer.add_message(2, choice);
  pbf_writer(to).add_message(number, entry);
}

void append_output(std::string& to, const InferResult& result) {
  std::string output;
  pbf_writer writer(output);
  add_text(writer, 1, result.name);
  add_text(writer, 2, result.datatype);
  const auto sizes = result.shape.sizes();
  writer.add_packed_int64(3, sizes.begin(), sizes.end());
  for (const auto& [name, value] : result.parameters) {
    append_parameter(output, kOutputParameters, name, value);
  }
  pbf_writer(to).add_message(kOutputs, output);
}

std::size_t bytes_of_elements(std::span<const InferResult> results) {
  std::size_t size = 0;
  for (const InferResult& result : results) size += result.shared ? 0 : result.byte_size;
  return size;
}

}  // namespace

InferAnswer::InferAnswer(std::string_view model_name, std::string_view model_version,
                         std::string_view id, std::span<const InferResult> results, bool stream,
                         const Parameters& parameters) {
  std::string head;
  pbf_writer writer(head);
  add_text(writer, 1, model_name);
  add_text(writer, 2, model_version);
  add_text(writer, 3, id);
  for (const auto& [name, value] : parameters) append_parameter(head, kParameters, name, value);
  if (stream) append_parameter(head, kParameters, kFinalResponse, true);
  for (const InferResult& result : results) append_output(head, result);

  const auto lay_out = [&](std::size_t before) {
    Frame frame(kPadding, before);
    frame.text() += head;
    for (const InferResult& result : results) {
      std::string raw;
      append_length(raw, kRawContents, result.shared ? 0 : result.byte_size);
      if (result.shared) {
        frame.text() += raw;
      } else {
        frame.add_room(raw, result.byte_size);
      }
    }
    return frame;
  };
  const Frame frame =
      stream ? enclose("", kInferResponse, bytes_of_elements(results), lay_out) : lay_out(0);
  std::vector<std::byte*> rooms;
  bytes_ = frame.write(rooms);
  auto room = rooms.begin();
  for (const InferResult& result : results) places.push_back(result.shared ? nullptr : *room++);
}

Bytes InferAnswer::finish() && { return std::move(bytes_); }

Bytes encode_infer_error(std::string_view message, std::string_view id,
                         std::string_view model_name) {
  std::string response;
  pbf_writer writer(response);
  add_text(writer, 1, model_name);
  add_text(writer, 3, id);
  append_parameter(response, kParameters, kFinalResponse, true);
  std::string answer;
  pbf_writer answer_writer(answer);
  add_text(answer_writer, kErrorMessage, as_utf8(message));
  answer_writer.add_message(kInferResponse, response);
  return bytes_of(answer);
}

}  // namespace attnserve::wire
