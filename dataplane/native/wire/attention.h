// The hot messages of attnserve.v1 (proto/attnserve/v1/attention.proto), decoded in place: texts
// and elements are views into the message they were read from, which must outlive what is decoded
// here.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"

namespace attnserve::wire {

struct RegionMessage {
  std::string_view name;
  std::uint64_t offset = 0;
  std::uint64_t byte_size = 0;
};

// One `Tensor` message. dtype is the number on the wire, known or not; dimensions as sent.
struct TensorMessage {
  enum class Content : std::uint8_t { kNone, kData, kSharedMemory, kChunked, kStored };
  std::int32_t dtype = 0;
  std::vector<std::int64_t> shape;
  Content content = Content::kNone;  // the last of the oneof, as protobuf has it
  ByteSpan data;                     // kData
  RegionMessage region;              // kSharedMemory
  std::uint64_t chunked_bytes = 0;   // kChunked
  std::string_view stored;           // kStored
};

// The tensors of AttendRequest, in the order of their field numbers (4 to 10, and 17 to 20).
enum class Input : std::uint8_t {
  kQuery,
  kKey,
  kValue,
  kHiddenStates,
  kContext,
  kKeyLengths,
  kBias,
  kSinks,
  kPrefixLengths,
  kCuSeqlensQ,
  kCuSeqlensK
};
constexpr std::size_t kInputs = 11;
std::string_view name_of(Input input);  // "query"
std::uint32_t field_of(Input input);    // 4
std::optional<Input> input_of_field(std::uint64_t field);

// The tensors of AttendResponse, in the order of their field numbers (4 to 11).
enum class Output : std::uint8_t {
  kOutput,
  kWeights,
  kEntropy,
  kTopKIndices,
  kTopKWeights,
  kMassPerKey,
  kMassByDistance,
  kLogSumExp
};
constexpr std::size_t kOutputs = 8;
std::string_view name_of(Output output);
std::uint32_t field_of(Output output);
std::optional<Output> output_of_name(std::string_view name);
std::optional<Input> input_of_name(std::string_view name);

struct ReturnOptions {
  bool no_output = false;
  bool weights = false;
  bool entropy = false;
  std::uint32_t top_k = 0;
  bool mass_per_key = false;
  std::uint32_t mass_by_distance = 0;
  bool log_sum_exp = false;
};

struct AttendRequest {
  std::string_view model, version, variant;
  std::array<std::optional<TensorMessage>, kInputs> tensors;  // by Input
  std::optional<float> scale, softcap;
  ReturnOptions returns;
  std::optional<RegionMessage> output_region;
  std::uint32_t priority = 0;
};

// How long what may be of a message before it is refused as a whole: unknown fields and repeated
// small ones cost time and memory beyond their bytes.
struct DecodeLimits {
  // Of one message, nested ones and each dimension of a shape included; padding and the elements of
  // InferTensorContents do not count.
  std::size_t max_fields = 4096;
};

// All decode functions throw RequestError INVALID_ARGUMENT, "message: given bytes that are not the
// request of METHOD (REASON); allowed: the message that its .proto file describes", for what
// protobuf would refuse too (invalid UTF-8 in a string included) and for messages beyond
// DecodeLimits.
AttendRequest decode_attend(ByteSpan message, std::string_view method);

struct TensorChunk {
  std::uint64_t tensor = 0;
  std::uint64_t offset = 0;
  ByteSpan data;
};

struct AttendStreamRequest {
  std::uint64_t request_id = 0;
  std::uint64_t timeout = 0;             // microseconds; 0: none
  std::optional<AttendRequest> request;  // at most one of these two
  std::optional<TensorChunk> chunk;
};
AttendStreamRequest decode_attend_stream(ByteSpan message);

struct PutTensorRequest {
  std::optional<TensorMessage> header;  // at most one of these two
  std::uint64_t lease = 0;              // microseconds, of the header
  std::optional<TensorChunk> chunk;
};
PutTensorRequest decode_put_tensor(ByteSpan message);

struct RenewTensorRequest {
  std::string_view handle;
  std::uint64_t lease = 0;
};
RenewTensorRequest decode_renew_tensor(ByteSpan message);
std::string_view decode_drop_tensor(ByteSpan message);  // the handle
struct RegisterSharedMemoryRequest {
  std::string_view key;
  std::uint64_t byte_size = 0;
};
RegisterSharedMemoryRequest decode_register_shared_memory(ByteSpan message);
std::string_view decode_unregister_shared_memory(ByteSpan message);  // the name

// Microseconds; see `Timings` in attention.proto.
struct Timings {
  std::uint64_t deserialize = 0, queue = 0, compute = 0, serialize = 0;
  std::uint32_t batch_size = 0;
};

// A tensor of an answer: where its elements will be, but not what they are.
struct ResultSpec {
  Output output;
  DataType dtype;
  Shape shape;
  std::size_t byte_size = 0;
};

// An AttendResponse that holds its tensors, laid out before they are computed: `bytes` is the whole
// message, `places[i]` where the elements of results[i] go (multiples of kAlignment from its start,
// in the stream's message too), or nullptr for one of more than `inline_bytes`, whose chunks
// follow. `finish` writes the timings into the room left for them. With `stream_id` it is an
// AttendStreamResponse around it.
class AttendAnswer {
 public:
  AttendAnswer(std::string_view model, std::string_view version, std::string_view variant,
               std::span<const ResultSpec> results,
               std::optional<std::uint64_t> stream_id = std::nullopt,
               std::size_t inline_bytes = SIZE_MAX);
  std::vector<std::byte*> places;
  Bytes finish(const Timings& timings) &&;
  Bytes& bytes() { return bytes_; }

 private:
  Bytes bytes_;
  std::size_t tail_ = 0;  // where in bytes_ the timings go
};

// An AttendResponse whose tensors all lie in shared memory: where each of them does.
struct SharedPlace {
  std::string_view region;
  std::uint64_t offset = 0;
};
Bytes encode_attend_response(std::string_view model, std::string_view version,
                             std::string_view variant, std::span<const ResultSpec> results,
                             std::span<const SharedPlace> places, const Timings& timings,
                             std::optional<std::uint64_t> stream_id = std::nullopt);

// The head of an AttendStreamResponse that holds a chunk; its `size` bytes of elements come right
// after. It takes a multiple of kAlignment bytes: so does a buffer for both keep the elements
// aligned.
Bytes encode_chunk_head(std::uint64_t request_id, Output output, std::uint64_t offset,
                        std::size_t size);
// Whatever of the status' message is not UTF-8 is replaced: callers could not read the answer.
Bytes encode_stream_error(std::uint64_t request_id, const Status& status);
Bytes encode_stored_tensor(std::string_view handle, std::uint64_t lease_microseconds,
                           std::uint64_t byte_size);
Bytes encode_register_shared_memory(std::string_view name);
Bytes encode_empty();  // DropTensorResponse, UnregisterSharedMemoryResponse

}  // namespace attnserve::wire
