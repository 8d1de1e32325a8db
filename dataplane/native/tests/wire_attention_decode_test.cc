#include <doctest/doctest.h>

#include <bit>

#include "wire/attention.h"
#include "wire_same.h"
#include "wire_support.h"

namespace attnserve::wire::tests {

using namespace std::literals;

namespace {

using tests::same;

bool same(const std::optional<float>& ours, bool there, float theirs) {
  return ours.has_value() == there &&
         (!there || std::bit_cast<std::uint32_t>(*ours) == std::bit_cast<std::uint32_t>(theirs));
}

bool same(const ReturnOptions& ours, const pb::ReturnOptions& theirs) {
  return ours.no_output == theirs.no_output() && ours.weights == theirs.weights() &&
         ours.entropy == theirs.entropy() && ours.top_k == theirs.top_k() &&
         ours.mass_per_key == theirs.mass_per_key() &&
         ours.mass_by_distance == theirs.mass_by_distance() &&
         ours.log_sum_exp == theirs.log_sum_exp();
}

bool same(const AttendRequest& ours, const pb::AttendRequest& theirs) {
  const auto tensor = [&](Input input) { return ours.tensors[static_cast<std::size_t>(input)]; };
  return ours.model == theirs.model() && ours.version == theirs.version() &&
         ours.variant == theirs.variant() &&
         same(tensor(Input::kQuery), theirs.has_query(), theirs.query()) &&
         same(tensor(Input::kKey), theirs.has_key(), theirs.key()) &&
         same(tensor(Input::kValue), theirs.has_value(), theirs.value()) &&
         same(tensor(Input::kHiddenStates), theirs.has_hidden_states(), theirs.hidden_states()) &&
         same(tensor(Input::kContext), theirs.has_context(), theirs.context()) &&
         same(tensor(Input::kKeyLengths), theirs.has_key_lengths(), theirs.key_lengths()) &&
         same(tensor(Input::kBias), theirs.has_bias(), theirs.bias()) &&
         same(tensor(Input::kSinks), theirs.has_sinks(), theirs.sinks()) &&
         same(tensor(Input::kPrefixLengths), theirs.has_prefix_lengths(),
              theirs.prefix_lengths()) &&
         same(tensor(Input::kCuSeqlensQ), theirs.has_cu_seqlens_q(), theirs.cu_seqlens_q()) &&
         same(tensor(Input::kCuSeqlensK), theirs.has_cu_seqlens_k(), theirs.cu_seqlens_k()) &&
         same(ours.scale, theirs.has_scale(), theirs.scale()) &&
         same(ours.softcap, theirs.has_softcap(), theirs.softcap()) &&
         same(ours.returns, theirs.returns()) &&
         same(ours.output_region, theirs.has_output_region(), theirs.output_region()) &&
         ours.priority == theirs.priority();
}

bool same(const TensorChunk& ours, const pb::TensorChunk& theirs) {
  return ours.tensor == theirs.tensor() && ours.offset == theirs.offset() &&
         text_of(ours.data) == theirs.data();
}

// Overload resolution prefers these to the template for what is declared before it.
bool same(const std::optional<AttendRequest>& ours, bool there, const pb::AttendRequest& theirs) {
  return ours.has_value() == there && (!there || same(*ours, theirs));
}

bool same(const std::optional<TensorChunk>& ours, bool there, const pb::TensorChunk& theirs) {
  return ours.has_value() == there && (!there || same(*ours, theirs));
}

bool same(const AttendStreamRequest& ours, const pb::AttendStreamRequest& theirs) {
  return ours.request_id == theirs.request_id() && ours.timeout == theirs.timeout() &&
         same(ours.request, theirs.has_request(), theirs.request()) &&
         same(ours.chunk, theirs.has_chunk(), theirs.chunk());
}

bool same(const PutTensorRequest& ours, const pb::PutTensorRequest& theirs) {
  return same(ours.header, theirs.has_header(), theirs.header().tensor()) &&
         ours.lease == theirs.header().lease() &&
         same(ours.chunk, theirs.has_chunk(), theirs.chunk());
}

bool same(const RenewTensorRequest& ours, const pb::RenewTensorRequest& theirs) {
  return ours.handle == theirs.handle() && ours.lease == theirs.lease();
}

bool same(const RegisterSharedMemoryRequest& ours, const pb::RegisterSharedMemoryRequest& theirs) {
  return ours.key == theirs.key() && ours.byte_size == theirs.byte_size();
}

bool same(std::string_view ours, const pb::DropTensorRequest& theirs) {
  return ours == theirs.handle();
}

bool same(std::string_view ours, const pb::UnregisterSharedMemoryRequest& theirs) {
  return ours == theirs.name();
}

template <class Theirs, class Decode>
void compare(std::uint64_t seed, std::size_t count, Decode decode) {
  compare_many<Theirs>(seed, count, [&](ByteSpan message, const Theirs& theirs) {
    return same(decode(message), theirs);
  });
}

AttendRequest attend(ByteSpan message) { return decode_attend(message, "Attend"); }

std::string refusal_of(const std::string& message) {
  return refusal([&] { attend(bytes_of(message)); });
}

}  // namespace

TEST_CASE("attention messages are read as protobuf reads them, or refused as it refuses them") {
  compare<pb::AttendRequest>(1, 60000, attend);
  compare<pb::AttendStreamRequest>(2, 60000, decode_attend_stream);
  compare<pb::PutTensorRequest>(3, 60000, decode_put_tensor);
  compare<pb::RenewTensorRequest>(4, 10000, decode_renew_tensor);
  compare<pb::DropTensorRequest>(5, 10000, decode_drop_tensor);
  compare<pb::RegisterSharedMemoryRequest>(6, 10000, decode_register_shared_memory);
  compare<pb::UnregisterSharedMemoryRequest>(7, 10000, decode_unregister_shared_memory);
}

TEST_CASE("elements are views into the message") {
  pb::AttendRequest request;
  request.mutable_query()->set_data("elements");
  const std::string message = request.SerializeAsString();
  const AttendRequest decoded = attend(bytes_of(message));
  const ByteSpan data = decoded.tensors[0]->data;
  CHECK(text_of(data) == "elements");
  CHECK(data.data() == bytes_of(message).data() + message.find("elements"));
}

TEST_CASE("a message that comes twice is merged, of a oneof the last member holds") {
  pb::AttendRequest first, second;
  first.set_model("a");
  first.mutable_query()->add_shape(1);
  first.mutable_query()->set_stored("handle");
  first.mutable_returns()->set_weights(true);
  second.set_model("b");
  second.mutable_query()->add_shape(2);
  second.mutable_query()->set_data("x");
  second.mutable_returns()->set_top_k(3);
  const std::string message = first.SerializeAsString() + second.SerializeAsString();
  const AttendRequest decoded = attend(bytes_of(message));
  CHECK(decoded.model == "b");
  CHECK(decoded.tensors[0]->shape == std::vector<std::int64_t>{1, 2});
  CHECK(decoded.tensors[0]->content == TensorMessage::Content::kData);
  CHECK(decoded.returns.weights);
  CHECK(decoded.returns.top_k == 3);
}

TEST_CASE("a refusal says which method's request it is not, and why") {
  CHECK(refusal_of("\xff\xff\xff") ==
        "message: given bytes that are not the request of Attend (a number that is cut off); "
        "allowed: the message that its .proto file describes");
  CHECK(refusal_of(field(1, "\xc3")).find("(field 1, a text, is not UTF-8)") != std::string::npos);
  CHECK(refusal_of(std::string("\0\0", 2)).find("(a field of number 0)") != std::string::npos);
  CHECK(refusal_of("\x0f").find("(field 1 is of wire type 7)") != std::string::npos);
  CHECK(refusal_of("\x0a\x05"
                   "abc")
            .find("(a field that is cut off)") != std::string::npos);
  CHECK(refusal([] { decode_put_tensor(bytes_of("\xff")); }).find("of PutTensor (") !=
        std::string::npos);
}

TEST_CASE("a message of more fields than allowed is refused at once") {
  const std::vector<std::string> parts{
      std::string("\xf8\x07\0", 3),  // a number that is not known
      field(1000, ""),               // likewise, bytes
      "\xfb\x07\xfc\x07",            // a group
      field(4, ""),                  // a tensor, again and again
      field(4, field(4, "")),
      std::string("\x80\x01\0", 3),  // the same number again and again
  };
  for (const std::string& part : parts) {
    std::string why;
    check_ends_early(part, [&](const std::string& message) { why = refusal_of(message); });
    CHECK(why.find("more than 4096 fields") != std::string::npos);
    check_ends_early(part, [&](const std::string& message) { why = refusal_of(message); }, {4});
    CHECK(why.find("more than 4096 fields") != std::string::npos);
    CHECK(refusal_of(repeated(part, 1000)) == "");
  }
  const std::string shape = field(4, field(2, std::string(kLarge, '\1')));
  CHECK(refusal_of(shape).find("too many dimensions") != std::string::npos);
}

TEST_CASE("padding does not count, and costs little") {
  const std::string padding = repeated(field(15, ""), kLarge);
  check_in_proportion(field(15, ""),
                      [](const std::string& message) { CHECK(refusal_of(message) == ""); });
  CHECK(attend(bytes_of(padding + field(1, "causal"))).model == "causal");
  const std::string chunk = field(3, repeated(field(4, std::string(62, '\0')), kLarge));
  CHECK(decode_attend_stream(bytes_of(chunk)).chunk.has_value());
}

TEST_CASE("inputs and outputs have the names and numbers of the .proto") {
  for (std::size_t index = 0; index < kInputs; ++index) {
    const auto input = static_cast<Input>(index);
    const auto* field =
        pb::AttendRequest::descriptor()->FindFieldByName(std::string(name_of(input)));
    REQUIRE(field != nullptr);
    CHECK(field->number() == field_of(input));
    CHECK(input_of_field(field_of(input)) == input);
    CHECK(input_of_name(name_of(input)) == input);
  }
  for (std::size_t index = 0; index < kOutputs; ++index) {
    const auto output = static_cast<Output>(index);
    const auto* field =
        pb::AttendResponse::descriptor()->FindFieldByName(std::string(name_of(output)));
    REQUIRE(field != nullptr);
    CHECK(field->number() == field_of(output));
    CHECK(output_of_name(name_of(output)) == output);
  }
  CHECK(!input_of_field(3));
  CHECK(!input_of_field(11));
  CHECK(!input_of_name("output"));
  CHECK(!output_of_name("query"));
}

TEST_CASE("a tag has 32 bits, in five bytes at the most") {
  const std::string handle = field(1, "paged");
  const auto refusal = [&](std::string_view more) {
    try {
      decode_drop_tensor(bytes_of(handle + std::string(more)));
      return std::string();
    } catch (const RequestError& error) {
      return error.status().message;
    }
  };
  CHECK(refusal("\xb8\x81\x80\x80\x80\x00\x07"sv).find("5 bytes") != std::string::npos);
  CHECK(refusal("\xb8\x81\x80\x80\x10\x07"sv).find("32 bits") != std::string::npos);
  CHECK(refusal("\xb8\x81\x80\x80\x0f\x07"sv).empty());
  CHECK(refusal("\xb8\x81\x80\x80\x00\x07"sv).empty());
}

}  // namespace attnserve::wire::tests
