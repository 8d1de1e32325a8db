// ModelInfer and ModelStreamInfer of the Open Inference Protocol (proto/inference/open_inference.proto),
// decoded in place: views into the message, which must outlive them. And grpc.health.v1.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"

namespace attnserve::wire {

// The value of an InferParameter; monostate: none was set.
using ParameterValue =
    std::variant<std::monostate, bool, std::int64_t, std::string_view, double, std::uint64_t>;
// A map field: in order of first appearance, the last value of a name holds.
using Parameters = std::vector<std::pair<std::string_view, ParameterValue>>;

// InferTensorContents, its packed or unpacked fields gathered. Which fields were set, by their names
// in the .proto ("fp32_contents"), in the order of their numbers.
struct Contents {
  std::vector<std::string_view> fields;
  Bytes elements;            // of the one field that holds them, as little-endian elements of
  DataType dtype = DataType::kUnspecified;  // this type; kUnspecified if fields.size() != 1 or the
                                            // field is none that attnserve has a type for
  std::size_t count = 0;
};

struct InferInput {
  std::string_view name, datatype;
  std::vector<std::int64_t> shape;
  Parameters parameters;
  std::optional<Contents> contents;
};

struct InferOutput {
  std::string_view name;
  Parameters parameters;
};

struct InferRequest {
  std::string_view model_name, model_version, id;
  Parameters parameters;
  std::vector<InferInput> inputs;
  std::vector<InferOutput> outputs;
  std::vector<ByteSpan> raw_input_contents;
};

// Throws RequestError INVALID_ARGUMENT as the functions of wire/attention.h do.
InferRequest decode_infer(ByteSpan message, std::string_view method);
// The model's name alone, for routing; never throws, empty if it cannot be told.
std::string_view peek_model_name(ByteSpan message);

// One output of an answer. `byte_size` elements follow raw, unless they lie in shared memory.
struct InferResult {
  std::string_view name, datatype;
  Shape shape;
  std::size_t byte_size = 0;
  Parameters parameters;   // of an output in shared memory
  bool shared = false;     // raw_output_contents gets an empty entry in its place
};

// A ModelInferResponse laid out before its elements are computed; `places[i]` is where those of
// results[i] go, kAlignment-aligned where the message bears it (an unknown field 1000 of bytes may
// be added as padding only if tritonclient and KServe's client ignore it; else unaligned results are
// computed elsewhere and copied: `aligned` says). With `stream` it is a ModelStreamInferResponse, and
// the parameter triton_final_response is set.
class InferAnswer {
 public:
  InferAnswer(std::string_view model_name, std::string_view model_version, std::string_view id,
              std::span<const InferResult> results, bool stream);
  std::vector<std::byte*> places;  // nullptr for shared ones
  Bytes finish() &&;
  Bytes& bytes() { return bytes_; }

 private:
  Bytes bytes_;
};

// A ModelStreamInferResponse with an error message; id and model_name say which request failed.
Bytes encode_infer_error(std::string_view message, std::string_view id, std::string_view model_name);

// grpc.health.v1: the service asked for, and the answer (1 SERVING, 2 NOT_SERVING, 3 unknown).
std::string_view decode_health_check(ByteSpan message);
Bytes encode_health(int serving_status);

}  // namespace attnserve::wire
