#include <cstring>

#include "inference/open_inference.pb.h"
#include "wire/open_inference.h"
#include "wire_support.h"

namespace attnserve::wire::tests {

namespace {

// Outputs of `elements` FP32 elements and more; of each, whether it lies in shared memory.
std::vector<InferResult> results_of(std::vector<bool> shared, std::int64_t elements) {
  constexpr std::array<std::string_view, 3> kNames{"output", "weights", "entropy"};
  std::vector<InferResult> results;
  for (const bool in_region : shared) {
    InferResult result;
    result.name = kNames[results.size()];
    result.datatype = "FP32";
    result.shape = Shape{1, elements};
    result.byte_size = static_cast<std::size_t>(elements) * 4;
    result.shared = in_region;
    if (in_region) {
      result.parameters = {{"shared_memory_region", std::string_view("r")},
                           {"shared_memory_byte_size", std::int64_t{elements * 4}}};
    }
    results.push_back(std::move(result));
    elements += 3;
  }
  return results;
}

void check_answer(std::string_view id, const std::vector<InferResult>& results, bool stream) {
  const Parameters parameters{{"variant", std::string_view("flash")},
                              {"none", std::monostate()},
                              {"no", false},
                              {"zero", 0.0},
                              {"count", std::uint64_t{0}}};
  InferAnswer answer("causal", "2", id, results, stream, parameters);
  REQUIRE(answer.places.size() == results.size());
  const std::byte* start = answer.bytes().data();
  for (std::size_t index = 0; index < results.size(); ++index) {
    std::byte* place = answer.places[index];
    CHECK((place == nullptr) == results[index].shared);
    if (place == nullptr) continue;
    if ((place - start) % kAlignment != 0) FAIL("an unaligned result");
    std::memset(place, 'a' + static_cast<int>(index), results[index].byte_size);
  }
  const Bytes message = std::move(answer).finish();
  inference::ModelStreamInferResponse whole;
  if (stream) {
    REQUIRE(whole.ParseFromString(std::string(text_of(message))));
    CHECK(whole.error_message().empty());
    CHECK(whole.ByteSizeLong() == message.size());  // lengths take no more bytes than they need
  } else {
    REQUIRE(whole.mutable_infer_response()->ParseFromString(std::string(text_of(message))));
  }
  const inference::ModelInferResponse& response = whole.infer_response();
  CHECK(response.model_name() == "causal");
  CHECK(response.model_version() == "2");
  CHECK(response.id() == id);
  REQUIRE(response.parameters_size() == (stream ? 6 : 5));
  CHECK(response.parameters().at("variant").string_param() == "flash");
  CHECK(response.parameters().at("none").parameter_choice_case() == 0);
  CHECK(response.parameters().at("no").has_bool_param());
  CHECK(response.parameters().at("zero").has_double_param());
  CHECK(response.parameters().at("count").has_uint64_param());
  if (stream) CHECK(response.parameters().at("triton_final_response").bool_param());
  REQUIRE(response.outputs_size() == static_cast<int>(results.size()));
  REQUIRE(response.raw_output_contents_size() == static_cast<int>(results.size()));
  for (int index = 0; index < response.outputs_size(); ++index) {
    const InferResult& result = results[static_cast<std::size_t>(index)];
    const auto& output = response.outputs(index);
    CHECK(output.name() == result.name);
    CHECK(output.datatype() == "FP32");
    CHECK(output.shape_size() == 2);
    CHECK(output.shape(1) == result.shape[1]);
    CHECK(output.parameters_size() == (result.shared ? 2 : 0));
    if (result.shared) {
      CHECK(output.parameters().at("shared_memory_region").string_param() == "r");
      CHECK(output.parameters().at("shared_memory_byte_size").int64_param() ==
            static_cast<std::int64_t>(result.byte_size));
    }
    const std::string elements(result.shared ? 0 : result.byte_size,
                               static_cast<char>('a' + index));
    if (response.raw_output_contents(index) != elements) FAIL("other elements than were put in");
  }
}

}  // namespace

TEST_CASE("an infer answer holds its outputs at multiples of 64, in their order") {
  for (const bool stream : {false, true}) {
    check_answer("", {}, stream);
    for (std::int64_t elements = 1; elements < 40; ++elements) {
      check_answer("7", results_of({false}, elements), stream);
      check_answer("7", results_of({false, true, false}, elements), stream);
      check_answer("7", results_of({true, false}, elements), stream);
      check_answer("7", results_of({true}, elements), stream);
    }
  }
}

TEST_CASE("a streamed infer answer is aligned whatever its length takes") {
  for (std::size_t id = 0; id < 140; ++id) {
    for (const std::int64_t elements : {3900, 3950, 4000, 4025, 4050, 4096}) {
      check_answer(std::string(id, 'i'), results_of({false}, elements), true);
      check_answer(std::string(id, 'i'), results_of({true, false}, elements), true);
    }
  }
  check_answer("", results_of({false}, (1 << 19) - 64), true);
}

TEST_CASE("a failed request within a stream is answered by its error, id and model") {
  const Bytes message = encode_infer_error("inputs: given \xff", "7", "causal");
  inference::ModelStreamInferResponse answer;
  REQUIRE(answer.ParseFromString(std::string(text_of(message))));
  CHECK(answer.error_message() == "inputs: given ?");
  CHECK(answer.infer_response().id() == "7");
  CHECK(answer.infer_response().model_name() == "causal");
  CHECK(answer.infer_response().parameters().at("triton_final_response").bool_param());
  CHECK(answer.ByteSizeLong() == message.size());
}

TEST_CASE("a health answer is one number") {
  CHECK(text_of(encode_health(1)) == "\x08\x01");
  CHECK(text_of(encode_health(3)) == "\x08\x03");
  CHECK(encode_health(0).empty());
}

}  // namespace attnserve::wire::tests
