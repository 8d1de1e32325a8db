#include <cstring>

#include "attnserve/v1/attention.pb.h"
#include "wire/attention.h"
#include "wire_support.h"

namespace attnserve::wire::tests {

namespace {

namespace pb = ::attnserve::v1;

constexpr Timings kTimings{1, 20, 300, 0, 5};
constexpr std::uint64_t kMost = ~std::uint64_t{0};
constexpr Timings kLongTimings{kMost, kMost, kMost, kMost, ~std::uint32_t{0}};

bool same(const Timings& ours, const pb::Timings& theirs) {
  return ours.deserialize == theirs.deserialize() && ours.queue == theirs.queue() &&
         ours.compute == theirs.compute() && ours.serialize == theirs.serialize() &&
         ours.batch_size == theirs.batch_size();
}

const pb::Tensor& tensor_of(const pb::AttendResponse& response, Output output) {
  const auto* field = pb::AttendResponse::descriptor()->FindFieldByNumber(field_of(output));
  return static_cast<const pb::Tensor&>(response.GetReflection()->GetMessage(response, field));
}

// Some of the results that an answer may have, in their order, of `elements` FP32 elements each.
std::vector<ResultSpec> results_of(std::uint32_t which, std::int64_t elements) {
  std::vector<ResultSpec> results;
  for (std::size_t index = 0; index < kOutputs; ++index) {
    if ((which >> index & 1) == 0) continue;
    const std::int64_t more = elements + static_cast<std::int64_t>(index) * 3;
    results.push_back({static_cast<Output>(index), DataType::kFp32, Shape{1, more},
                       static_cast<std::size_t>(more) * 4});
  }
  return results;
}

std::string elements_of(const ResultSpec& result) {
  return std::string(result.byte_size, static_cast<char>('a' + static_cast<int>(result.output)));
}

// Encodes an answer, reads it by protobuf and compares; gives its size.
std::size_t check_answer(const std::string& model, std::span<const ResultSpec> results,
                         const Timings& timings, std::optional<std::uint64_t> stream_id) {
  AttendAnswer answer(model, "1", "flash", results, stream_id);
  REQUIRE(answer.places.size() == results.size());
  const std::byte* start = answer.bytes().data();
  CHECK(reinterpret_cast<std::uintptr_t>(start) % kAlignment == 0);
  for (std::size_t index = 0; index < results.size(); ++index) {
    if ((answer.places[index] - start) % kAlignment != 0) FAIL("an unaligned result");
    const std::string elements = elements_of(results[index]);
    if (!elements.empty()) std::memcpy(answer.places[index], elements.data(), elements.size());
  }
  const Bytes message = std::move(answer).finish(timings);
  pb::AttendStreamResponse whole;
  if (stream_id) {
    REQUIRE(whole.ParseFromString(std::string(text_of(message))));
    CHECK(whole.request_id() == *stream_id);
    CHECK(whole.has_response());
    // The response's length takes no more bytes than it needs.
    std::string head(text_of(encode_stream_error(*stream_id, {})));
    head.resize(head.size() - 2);
    const std::size_t inside = message.size() - head.size() - 1;
    const std::size_t width = inside < 130 ? 1 : inside < 16387 ? 2 : inside < 2097156 ? 3 : 4;
    std::string whole_head = head + '\x12';
    append_varint(whole_head, inside - width);
    CHECK(text_of(message).substr(0, whole_head.size()) == whole_head);
  } else {
    REQUIRE(whole.mutable_response()->ParseFromString(std::string(text_of(message))));
  }
  const pb::AttendResponse& response = whole.response();
  CHECK(response.model() == model);
  CHECK(response.version() == "1");
  CHECK(response.variant() == "flash");
  CHECK(same(timings, response.timings()));
  for (const ResultSpec& result : results) {
    const pb::Tensor& tensor = tensor_of(response, result.output);
    CHECK(tensor.dtype() == pb::FP32);
    CHECK(tensor.shape_size() == 2);
    CHECK(tensor.shape(1) == result.shape[1]);
    if (tensor.data() != elements_of(result)) FAIL("other elements than were put in");
  }
  return message.size();
}

template <class Theirs>
Theirs parsed(const Bytes& message) {
  Theirs theirs;
  REQUIRE(theirs.ParseFromString(std::string(text_of(message))));
  return theirs;
}

}  // namespace

TEST_CASE("an answer holds its tensors at multiples of 64, and its timings") {
  for (std::uint32_t which = 0; which < 1U << kOutputs; ++which) {
    check_answer("causal", results_of(which, 5), kTimings, std::nullopt);
    check_answer("", results_of(which, 100), kLongTimings, std::nullopt);
    check_answer("causal", results_of(which, 7), {}, 1);
  }
}

TEST_CASE("a streamed answer holds its tensors at multiples of 64 whatever its length takes") {
  // Every length of the head, around each number of elements at which a length takes a byte more.
  for (std::size_t name = 0; name < 140; ++name) {
    for (const std::int64_t elements : {1, 20, 32, 3990, 4020, 4050, 4080, 4096}) {
      check_answer(std::string(name, 'm'), results_of(1, elements), kTimings, 3);
    }
  }
  for (std::int64_t elements = 1; elements < 80; ++elements) {
    check_answer("m", results_of(3, elements), kLongTimings, kMost);
  }
  check_answer("causal", results_of(1, (1 << 19) - 16), kTimings, 7);
  check_answer("", {}, kTimings, 7);
}

TEST_CASE("an answer in shared memory is what protobuf writes") {
  const std::vector<ResultSpec> results = results_of(0b1010001, 6);
  const std::vector<SharedPlace> places{{"region", 0}, {"region", 64}, {"region", 1 << 20}};
  for (const bool stream : {false, true}) {
    pb::AttendStreamResponse theirs;
    theirs.set_request_id(9);
    pb::AttendResponse& response = *theirs.mutable_response();
    response.set_model("causal");
    response.set_version("12");
    response.mutable_timings()->set_deserialize(1);
    response.mutable_timings()->set_queue(20);
    response.mutable_timings()->set_compute(300);
    response.mutable_timings()->set_batch_size(5);
    for (std::size_t index = 0; index < results.size(); ++index) {
      const auto* field =
          pb::AttendResponse::descriptor()->FindFieldByNumber(field_of(results[index].output));
      auto& tensor =
          static_cast<pb::Tensor&>(*response.GetReflection()->MutableMessage(&response, field));
      tensor.set_dtype(pb::FP32);
      tensor.add_shape(1);
      tensor.add_shape(results[index].shape[1]);
      tensor.mutable_shared_memory()->set_name("region");
      tensor.mutable_shared_memory()->set_offset(places[index].offset);
      tensor.mutable_shared_memory()->set_byte_size(results[index].byte_size);
    }
    const Bytes ours =
        encode_attend_response("causal", "12", "", results, places, kTimings,
                               stream ? std::optional<std::uint64_t>(9) : std::nullopt);
    CHECK(text_of(ours) == (stream ? theirs.SerializeAsString() : response.SerializeAsString()));
  }
}

TEST_CASE("the head of a chunk takes a multiple of 64 bytes, and its elements follow") {
  std::vector<std::size_t> sizes{1, 1000, 16250, 16383, 16384, 1 << 20, (1 << 21) - 1};
  for (std::size_t size = 0; size < 260; ++size) sizes.push_back(size);
  for (std::size_t size = 16384 - 140; size < 16384; ++size) sizes.push_back(size);
  for (const std::size_t size : sizes) {
    for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{1} << 20, kMost}) {
      for (const std::uint64_t id : {std::uint64_t{1}, std::uint64_t{300}, kMost}) {
        const Bytes head = encode_chunk_head(id, Output::kWeights, offset, size);
        CHECK(head.size() % kAlignment == 0);
        const std::string message = std::string(text_of(head)) + std::string(size, 'e');
        pb::AttendStreamResponse theirs;
        REQUIRE(theirs.ParseFromString(message));
        CHECK(theirs.request_id() == id);
        CHECK(theirs.chunk().tensor() == field_of(Output::kWeights));
        CHECK(theirs.chunk().offset() == offset);
        CHECK(theirs.chunk().data() == std::string(size, 'e'));
        // Lengths take no more bytes than they need.
        if (size != 0) CHECK(theirs.ByteSizeLong() == message.size());
      }
    }
  }
}

TEST_CASE("an error within a stream says code, message and when to come back") {
  Status status{Code::kResourceExhausted, "queue: full", std::chrono::microseconds(1500)};
  const auto error = parsed<pb::AttendStreamResponse>(encode_stream_error(5, status));
  CHECK(error.request_id() == 5);
  CHECK(error.error().code() == 8);
  CHECK(error.error().message() == "queue: full");
  CHECK(error.error().retry_after() == 1500);
  CHECK(error.SerializeAsString() == text_of(encode_stream_error(5, status)));
  status.message = "given \xff\xc3; allowed: \xc3\xa9";
  CHECK(parsed<pb::AttendStreamResponse>(encode_stream_error(5, status)).error().message() ==
        "given ??; allowed: \xc3\xa9");
}

TEST_CASE("small answers are what protobuf writes") {
  pb::StoredTensor stored;
  stored.set_handle("h");
  stored.set_lease(300'000'000);
  stored.set_byte_size(64);
  CHECK(text_of(encode_stored_tensor("h", 300'000'000, 64)) == stored.SerializeAsString());
  pb::RegisterSharedMemoryResponse registered;
  registered.set_name("region");
  CHECK(text_of(encode_register_shared_memory("region")) == registered.SerializeAsString());
  CHECK(encode_empty().empty());
}

}  // namespace attnserve::wire::tests
