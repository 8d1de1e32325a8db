#include <algorithm>
#include <cstring>

#include "attnserve/v1/attention.pb.h"
#include "wire/kv_sessions.h"
#include "wire_support.h"

namespace attnserve::wire::tests {

namespace {

namespace pb = ::attnserve::v1;

constexpr std::uint64_t kMost = ~std::uint64_t{0};
constexpr Timings kTimings{1, 20, 300, 0, 5};
constexpr Timings kLongTimings{kMost, kMost, kMost, kMost, ~std::uint32_t{0}};

pb::DecodeResponse parsed(const Bytes& message) {
  pb::DecodeResponse theirs;
  REQUIRE(theirs.ParseFromString(std::string(text_of(message))));
  return theirs;
}

// What we wrote is what protobuf would write.
void check_canonical(const Bytes& message) {
  CHECK(parsed(message).SerializeAsString() == text_of(message));
}

bool same(const SessionState& ours, const pb::SessionState& theirs) {
  return ours.session_id == theirs.session_id() && ours.length == theirs.length() &&
         ours.max_tokens == theirs.max_tokens() &&
         ours.reserved_tokens == theirs.reserved_tokens() && ours.lease == theirs.lease();
}

bool same(const Timings& ours, const pb::Timings& theirs) {
  return ours.deserialize == theirs.deserialize() && ours.queue == theirs.queue() &&
         ours.compute == theirs.compute() && ours.serialize == theirs.serialize() &&
         ours.batch_size == theirs.batch_size();
}

// Some of the results that a layer may have: [tokens, 2] of FP32, of output and weights 3 more, and
// weights of two sessions.
std::vector<LayerResult> results_of(std::uint32_t which, std::int64_t tokens) {
  std::vector<LayerResult> results;
  for (std::size_t index = 0; index < kLayerOutputs; ++index) {
    if ((which >> index & 1) == 0) continue;
    const auto output = static_cast<LayerOutput>(index);
    const bool three = output == LayerOutput::kOutput || output == LayerOutput::kWeights;
    const Shape shape = three ? Shape{tokens, 2, 3} : Shape{tokens, 2};
    results.push_back({output, DataType::kFp32, shape,
                       static_cast<std::size_t>(shape.elements()) * sizeof(float)});
    if (output == LayerOutput::kWeights) results.push_back(results.back());
  }
  return results;
}

std::string elements_of(std::size_t index, const LayerResult& result) {
  return std::string(result.byte_size, static_cast<char>('a' + index));
}

// All tensors that it has, in the order of their numbers.
std::vector<pb::Tensor> tensors_of(const pb::AttendedLayer& layer) {
  std::vector<pb::Tensor> tensors;
  if (layer.has_output()) tensors.push_back(layer.output());
  if (layer.has_log_sum_exp()) tensors.push_back(layer.log_sum_exp());
  if (layer.has_entropy()) tensors.push_back(layer.entropy());
  tensors.insert(tensors.end(), layer.weights().begin(), layer.weights().end());
  return tensors;
}

void check_answer(std::uint64_t request_id, std::uint32_t which, std::int64_t tokens,
                  bool step_ended, const Timings& timings,
                  const std::vector<std::int64_t>& lengths = {}) {
  const std::vector<LayerResult> results = results_of(which, tokens);
  LayerAnswer answer(request_id, results, lengths);
  REQUIRE(answer.places.size() == results.size());
  const std::byte* start = answer.bytes().data();
  for (std::size_t index = 0; index < results.size(); ++index) {
    if ((answer.places[index] - start) % kAlignment != 0) FAIL("an unaligned result");
    const std::string elements = elements_of(index, results[index]);
    std::memcpy(answer.places[index], elements.data(), elements.size());
  }
  const Bytes message = std::move(answer).finish(step_ended, timings);
  const pb::DecodeResponse whole = parsed(message);
  CHECK(whole.request_id() == request_id);
  CHECK(whole.attended().step_ended() == step_ended);
  CHECK(same(timings, whole.attended().timings()));
  CHECK(std::ranges::equal(whole.attended().lengths(), lengths));
  CHECK(whole.attended().has_output() == (which & 1));
  CHECK(whole.attended().has_log_sum_exp() == (which >> 1 & 1));
  CHECK(whole.attended().has_entropy() == (which >> 2 & 1));
  const std::vector<pb::Tensor> tensors = tensors_of(whole.attended());
  REQUIRE(tensors.size() == results.size());
  for (std::size_t index = 0; index < results.size(); ++index) {
    const pb::Tensor& tensor = tensors[index];
    CHECK(tensor.dtype() == pb::FP32);
    REQUIRE(tensor.shape_size() == static_cast<int>(results[index].shape.rank()));
    CHECK(tensor.shape(0) == tokens);
    if (tensor.data() != elements_of(index, results[index])) FAIL("not what was put in");
  }
}

}  // namespace

TEST_CASE("a layer's answer holds its tensors at multiples of 64, and its timings") {
  for (std::uint32_t which = 0; which < 1U << kLayerOutputs; ++which) {
    for (const std::int64_t tokens : {1, 2, 5, 8, 100, 160, 165, 170, 680, 690, 21840, 21850}) {
      check_answer(1, which, tokens, false, kTimings);
      check_answer(kMost, which, tokens, true, kLongTimings, {0, 300, 70000});
    }
    for (std::int64_t tokens = 1; tokens < 80; ++tokens) check_answer(300, which, tokens, true, {});
  }
}

TEST_CASE("a layer's answer in shared memory says where each tensor lies") {
  const std::vector<LayerResult> results = results_of(0b101, 6);
  const std::vector<SharedPlace> places{{"region", 0}, {"region", 192}};
  const std::vector<std::int64_t> lengths{0, 17};
  const Bytes message = encode_attended_layer(9, results, places, lengths, true, kTimings);
  const pb::AttendedLayer layer = parsed(message).attended();
  CHECK(parsed(message).ByteSizeLong() == text_of(message).size());
  CHECK(std::ranges::equal(layer.lengths(), lengths));
  CHECK(layer.output().shared_memory().name() == "region");
  CHECK(layer.output().shared_memory().byte_size() == 144);
  CHECK(layer.entropy().shared_memory().offset() == 192);
  CHECK(!layer.has_log_sum_exp());
  CHECK(layer.step_ended());
  CHECK(same(kTimings, layer.timings()));
}

TEST_CASE("sessions are what protobuf writes") {
  const std::vector<SessionState> sessions{{"one", 32, 4096, 2048, 300'000'000}, {"two", 0, 1, 1}};
  const Bytes opened = encode_opened(7, sessions);
  check_canonical(opened);
  CHECK(parsed(opened).request_id() == 7);
  REQUIRE(parsed(opened).opened().sessions_size() == 2);
  CHECK(same(sessions[0], parsed(opened).opened().sessions(0)));
  CHECK(same(sessions[1], parsed(opened).opened().sessions(1)));
  const Bytes session = encode_session(kMost, sessions[0]);
  check_canonical(session);
  CHECK(same(sessions[0], parsed(session).session()));
}

TEST_CASE("other answers of Decode are what protobuf writes") {
  const std::vector<std::int64_t> lengths{0, 5, 4096};
  const Bytes begun = encode_begun(3, 12, lengths);
  check_canonical(begun);
  CHECK(parsed(begun).begun().step_id() == 12);
  CHECK(parsed(begun).begun().lengths(2) == 4096);
  check_canonical(encode_begun(3, 1, {}));
  check_canonical(encode_done(4));
  CHECK(parsed(encode_done(4)).has_done());
  const Status status{Code::kNotFound, "session_id: \xff", std::chrono::microseconds(3)};
  const Bytes error = encode_decode_error(5, status);
  check_canonical(error);
  CHECK(parsed(error).error().code() == 5);
  CHECK(parsed(error).error().message() == "session_id: ?");
  CHECK(parsed(error).error().retry_after() == 3);
}

TEST_CASE("what is said of a session that has moved is what protobuf writes") {
  const MovedSession moved{"here", "b:8001", "name:8001", "there", kMost};
  const auto same_moved = [&](const pb::MovedSession& told) {
    return told.session_id() == "here" && told.address() == "b:8001" &&
           told.authority() == "name:8001" && told.new_session_id() == "there" &&
           told.length() == kMost;
  };
  const Bytes event = encode_moved(moved);
  check_canonical(event);
  CHECK(parsed(event).request_id() == 0);
  CHECK(same_moved(parsed(event).moved()));
  const Bytes error = encode_decode_error(5, {Code::kUnavailable, "moved", {}}, moved);
  check_canonical(error);
  CHECK(parsed(error).request_id() == 5);
  CHECK(parsed(error).error().code() == 14);
  CHECK(same_moved(parsed(error).error().moved()));
  const SessionState session{"one", 32, 4096, 2048, 300'000'000};
  pb::SessionState state;
  REQUIRE(state.ParseFromString(std::string(text_of(encode_session_state(session)))));
  CHECK(same(session, state));
}

TEST_CASE("the data of an exported chunk follows its head") {
  for (const std::size_t size : {1, 100, 127, 128, 16383, 16384, 1 << 20}) {
    for (const bool last : {false, true}) {
      const std::string data(size, 'p');
      const Bytes head = encode_session_chunk_head(8, 300, last, size);
      pb::DecodeResponse whole;
      REQUIRE(whole.ParseFromString(std::string(text_of(head)) + data));
      CHECK(whole.request_id() == 8);
      CHECK(whole.chunk().index() == 300);
      CHECK(whole.chunk().last() == last);
      CHECK(whole.chunk().data() == data);
      CHECK(whole.ByteSizeLong() == head.size() + size);
    }
  }
}

}  // namespace attnserve::wire::tests
