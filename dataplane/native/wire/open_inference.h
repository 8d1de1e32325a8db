// ModelInfer and ModelStreamInfer of the Open Inference Protocol
// (proto/inference/open_inference.proto), decoded in place: views into the message, which must
// outlive them. And grpc.health.v1.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
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

// InferTensorContents, its packed or unpacked fields gathered.
struct Contents {
  // Which fields were set, by their names in the .proto ("fp32_contents"), in the order of their
  // numbers.
  std::vector<std::string_view> fields;
  // What the field holds, if it is the only one and attnserve has a type for it; else kUnspecified,
  // and the elements are left out.
  DataType dtype = DataType::kUnspecified;
  std::size_t count = 0;  // elements
  Bytes elements;         // little-endian
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

// Throws RequestError INVALID_ARGUMENT as the functions of wire/attention.h do. Elements of
// `contents` take up to eight times the memory that they take in the message: `budget` is charged
// for it, by the lease of their Bytes, before it is taken (RESOURCE_EXHAUSTED). nullptr: nobody is
// charged.
InferRequest decode_infer(ByteSpan message, std::string_view method, ByteBudget* budget = nullptr);

// One output of an answer. `byte_size` elements follow raw, unless they lie in shared memory.
struct InferResult {
  std::string_view name, datatype;
  Shape shape;
  std::size_t byte_size = 0;
  Parameters parameters;  // of an output in shared memory
  bool shared = false;    // raw_output_contents gets an empty entry in its place
};

// A ModelInferResponse laid out before its elements are computed; `places[i]` is where those of
// results[i] go, at multiples of kAlignment from the message's start: a `bytes` field of number
// 1000, which the protocol does not have and clients skip, pads it. `parameters` are the answer's
// own. With `stream` it is a ModelStreamInferResponse, and the parameter triton_final_response is
// set, too.
class InferAnswer {
 public:
  InferAnswer(std::string_view model_name, std::string_view model_version, std::string_view id,
              std::span<const InferResult> results, bool stream, const Parameters& parameters = {});
  std::vector<std::byte*> places;  // nullptr for shared ones
  Bytes finish() &&;
  Bytes& bytes() { return bytes_; }

 private:
  Bytes bytes_;
};

// A ModelStreamInferResponse with an error message; id and model_name say which request failed.
// What of the message is not UTF-8 is replaced.
Bytes encode_infer_error(std::string_view message, std::string_view id,
                         std::string_view model_name);

// grpc.health.v1: the service asked for, and the answer (1 SERVING, 2 NOT_SERVING, 3 unknown).
std::string_view decode_health_check(ByteSpan message);
Bytes encode_health(int serving_status);

}  // namespace attnserve::wire
