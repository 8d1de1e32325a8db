#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "requests/attend.h"
#include "requests/tensor_spec.h"
#include "requests_infer_support.h"
#include "requests_support.h"

namespace attnserve::requests {
namespace {

using engine::Feed;
using engine::Result;

AttendPlan plan_of(World& world, const Request& request) {
  return plan_attend(request.message, world.context(), kPeer, false);
}

std::unique_ptr<PreparedAttend> prepared_of(World& world, const Request& request) {
  return prepare(plan_of(world, request), request.elements(), world.context(), kPeer);
}

const Tensor& feed(const PreparedAttend& prepared, Feed name) {
  return prepared.work.feeds[static_cast<std::size_t>(name)];
}

template <class Element>
std::vector<Element> elements(const Tensor& tensor) {
  std::vector<Element> copy(static_cast<std::size_t>(tensor.shape.elements()));
  std::memcpy(copy.data(), tensor.data, copy.size() * sizeof(Element));
  return copy;
}

void layer_of(Request& request, std::string_view model) {
  request.query().reset();
  request.key().reset();
  request.value().reset();
  request.message.model = model;
  request.hidden_states() = request.tensor({1, 3, 32});
}

struct Case {
  std::string name;
  std::function<void(Request&)> change;
  std::string variant, diagnosis;
  double query_factor;
  std::optional<float> softcap;
  std::size_t request_bytes, response_bytes, working_bytes;
};

const std::vector<Case> kCases{
    {"plain", [](Request&) {}, "native", "", 1, {}, 1152, 384, 16780288},
    {"weights",
     [](Request& r) { r.message.returns.weights = true; },
     "reference",
     "",
     1,
     {},
     1152,
     528,
     864},
    {"entropy",
     [](Request& r) { r.message.returns.entropy = true; },
     "native",
     "diagnostics",
     1,
     {},
     1152,
     432,
     16780384},
    {"entropy alone",
     [](Request& r) { r.message.returns.entropy = r.message.returns.no_output = true; },
     "diagnostics",
     "diagnostics",
     1,
     {},
     1152,
     48,
     16779616},
    {"entropy of a variant with weights",
     [](Request& r) {
       r.message.variant = "reference";
       r.message.returns.entropy = true;
     },
     "reference",
     "",
     1,
     {},
     1152,
     432,
     864},
    {"entropy beside a variant without",
     [](Request& r) {
       r.message.variant = "fused";
       r.message.returns.entropy = true;
     },
     "fused",
     "diagnostics",
     1,
     {},
     1152,
     432,
     16780384},
    {"everything",
     [](Request& r) { r.message.returns = {false, true, true, 2, true, 3}; },
     "reference",
     "",
     1,
     {},
     1152,
     960,
     864},
    {"scale",
     [](Request& r) { r.message.scale = 0.7F; },
     "native",
     "",
     1.9798989536048544,
     {},
     1152,
     384,
     16780288},
    {"the model's own scale",
     [](Request& r) { r.message.scale = 0.35355339059327373F; },
     "native",
     "",
     1,
     {},
     1152,
     384,
     16780288},
    {"softcap", [](Request& r) { r.message.softcap = 3.0F; }, "native", "", 1, 3.0F, 1152, 384,
     16780288},
    {"the model's own softcap",
     [](Request& r) {
       r.message.model = "capped";
       r.message.softcap = 5.0F;
     },
     "native",
     "",
     1,
     {},
     1152,
     384,
     16780288},
    {"no softcap",
     [](Request& r) { r.message.softcap = 0.0F; },
     "native",
     "",
     1,
     {},
     1152,
     384,
     16780288},
    {"the model's own softcap, its variant by name",
     [](Request& r) {
       r.message.model = "capped";
       r.message.variant = "softcap";
     },
     "softcap",
     "",
     1,
     {},
     1152,
     384,
     864},
    {"layer", [](Request& r) { layer_of(r, "self"); }, "fused", "", 1, {}, 384, 384, 864},
    {"layer with a context",
     [](Request& r) {
       layer_of(r, "cross");
       r.context() = r.tensor({1, 5, 24});
     },
     "fused",
     "",
     1,
     {},
     864,
     384,
     1440},
    {"weights of a layer",
     [](Request& r) {
       layer_of(r, "self");
       r.message.returns.weights = true;
       r.message.returns.mass_by_distance = 2;
     },
     "reference",
     "",
     1,
     {},
     384,
     560,
     864},
    {"bias",
     [](Request& r) { r.bias() = r.bias_of<float>(DataType::kFp32, {{5, -kInf}}); },
     "native",
     "",
     1,
     {},
     1188,
     384,
     16780360},
};

TEST_CASE("a plan says which graphs run, with what, and what that takes") {
  for (const Case& each : kCases) {
    CAPTURE(each.name);
    World world;
    Request request;
    each.change(request);
    const AttendPlan plan = plan_of(world, request);
    CHECK(plan.variant->name() == each.variant);
    CHECK((plan.diagnosis != nullptr ? plan.diagnosis->name() : "") == each.diagnosis);
    CHECK(plan.query_factor == each.query_factor);
    CHECK(plan.softcap == each.softcap);
    CHECK(plan.request_bytes == each.request_bytes);
    CHECK(plan.sent_bytes == each.request_bytes);
    CHECK(plan.response_bytes == each.response_bytes);
    CHECK(plan.working_bytes == each.working_bytes);
    const auto prepared = prepare(plan, request.elements(), world.context(), kPeer);
    CHECK(prepared->work.joinable == (each.name != "bias"));
    CHECK(prepared->work.key == plan.key);
    for (const engine::Variant* graph : {plan.variant, plan.diagnosis}) {
      if (graph == nullptr) continue;
      for (const engine::Port& port : graph->session->inputs()) {
        CAPTURE(port.name);
        bool fed = false;
        for (std::size_t i = 0; i < engine::kFeeds; ++i) {
          const Tensor& tensor = prepared->work.feeds[i];
          if (name_of(static_cast<Feed>(i)) == port.name) fed = tensor.data != nullptr;
        }
        CHECK(fed);
      }
    }
  }
}

TEST_CASE("results come in the order of their fields, each of its own type and shape") {
  World world;
  Request request("grouped");
  request.query() = request.tensor({2, 4, 3, 8});
  request.key() = request.tensor({2, 2, 5, 8});
  request.value() = request.tensor({2, 2, 5, 6});
  request.message.returns = {false, true, true, 2, true, 4};
  const AttendPlan plan = plan_of(world, request);
  CHECK(plan.model->facts.version == 10);
  struct Expected {
    wire::Output output;
    DataType dtype;
    Shape shape;
  };
  using enum wire::Output;
  const std::vector<Expected> expected{
      {kOutput, DataType::kFp32, {2, 4, 3, 6}},      {kWeights, DataType::kFp32, {2, 4, 3, 5}},
      {kEntropy, DataType::kFp32, {2, 4, 3}},        {kTopKIndices, DataType::kInt64, {2, 4, 3, 2}},
      {kTopKWeights, DataType::kFp32, {2, 4, 3, 2}}, {kMassPerKey, DataType::kFp32, {2, 4, 5}},
      {kMassByDistance, DataType::kFp32, {2, 4, 4}},
  };
  REQUIRE(plan.results.size() == expected.size());
  std::size_t total = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(plan.results[i].output == expected[i].output);
    CHECK(plan.results[i].dtype == expected[i].dtype);
    CHECK(plan.results[i].shape == expected[i].shape);
    CHECK(plan.results[i].byte_size ==
          static_cast<std::size_t>(expected[i].shape.elements()) * item_bytes(expected[i].dtype));
    total += plan.results[i].byte_size;
  }
  CHECK(plan.response_bytes == total);
  const std::vector<std::uint64_t> starts = offsets(plan.results);
  CHECK(starts == std::vector<std::uint64_t>{0, 576, 1088, 1216, 1600, 1792, 1984, 2112});
}

TEST_CASE("priority 0 is normal") {
  World world;
  Request request;
  CHECK(plan_of(world, request).priority == kNormal);
  request.message.priority = kHigh;
  CHECK(plan_of(world, request).priority == kHigh);
}

TEST_CASE("tensors are fed from where the caller put them, whatever their address") {
  World world;
  Request request;
  const Bytes odd = Bytes::allocate(385);
  std::memset(const_cast<std::byte*>(odd.data()), 0, odd.size());
  request.key()->data = odd.span().subspan(1);
  const auto prepared = prepared_of(world, request);
  CHECK(feed(*prepared, Feed::kQuery).data == request.query()->data.data());
  CHECK(feed(*prepared, Feed::kKey).data == odd.data() + 1);
  CHECK(prepared->copies.empty());
}

TEST_CASE("lengths and a bias that are not aligned are looked at all the same") {
  World world;
  Request request;
  const Bytes odd = Bytes::allocate(64);
  auto* bytes = const_cast<std::byte*>(odd.data());
  std::memset(bytes, 0, odd.size());
  bytes[3] = std::byte{2};
  request.key_lengths() = request.lengths({0});
  request.key_lengths()->data = odd.span().subspan(3, 8);
  CHECK(elements<std::int64_t>(feed(*prepared_of(world, request), Feed::kKeyLengths)) ==
        std::vector<std::int64_t>{2});
  bytes[3] = std::byte{4};
  CHECK(status_thrown([&] { prepared_of(world, request); }).message ==
        "key_lengths[0]: given 4; allowed: 0..3");
  request.key_lengths().reset();
  request.bias() = request.tensor({1, 1, 3, 3});
  std::memcpy(bytes + 1 + 8 * sizeof(float), &kNan, sizeof kNan);
  request.bias()->data = odd.span().subspan(1, 36);
  CHECK(status_thrown([&] { prepared_of(world, request); }).message ==
        "bias[0, 0, 2, 2]: given nan; allowed: finite numbers and -infinity");
}

TEST_CASE("what the graphs take and the request leaves out is added") {
  World world;
  Request request;
  auto prepared = prepared_of(world, request);
  CHECK(elements<std::int64_t>(feed(*prepared, Feed::kKeyLengths)) == std::vector<std::int64_t>{3});
  CHECK(feed(*prepared, Feed::kBias).shape == Shape{1, 1, 1, 1});
  CHECK(elements<float>(feed(*prepared, Feed::kBias)) == std::vector<float>{0});
  CHECK(elements<float>(feed(*prepared, Feed::kSoftcap)) == std::vector<float>{-1});
  CHECK(feed(*prepared, Feed::kTopK).data == nullptr);
  CHECK(feed(*prepared, Feed::kDistances).data == nullptr);

  request.all({20, 4, 3, 8});
  request.message.returns = {false, false, false, 2, false, 3};
  prepared = prepared_of(world, request);
  CHECK(elements<std::int64_t>(feed(*prepared, Feed::kKeyLengths)) ==
        std::vector<std::int64_t>(20, 3));
  CHECK(elements<std::int64_t>(feed(*prepared, Feed::kTopK)) == std::vector<std::int64_t>{2});
  CHECK(elements<std::int64_t>(feed(*prepared, Feed::kDistances)) == std::vector<std::int64_t>{3});

  Request half("half", DataType::kFp16);
  CHECK(feed(*prepared_of(world, half), Feed::kBias).dtype == DataType::kFp16);
  Request bare("bare");
  prepared = prepared_of(world, bare);
  CHECK(feed(*prepared, Feed::kKeyLengths).data == nullptr);
  CHECK(feed(*prepared, Feed::kBias).data == nullptr);
  CHECK(feed(*prepared, Feed::kSoftcap).data == nullptr);
}

TEST_CASE("a boolean bias is a mask for graphs that take one, and else a bias of -infinity") {
  World world;
  for (const bool takes_mask : {true, false}) {
    Request request(takes_mask ? "masked" : "causal");
    request.bias() = request.with<std::uint8_t>({1, 1, 1, 3}, DataType::kBool, {1, 0, 1});
    const auto prepared = prepared_of(world, request);
    CHECK(!prepared->work.joinable);
    if (takes_mask) {
      CHECK(elements<std::uint8_t>(feed(*prepared, Feed::kMask)) ==
            std::vector<std::uint8_t>{1, 0, 1});
      CHECK(elements<float>(feed(*prepared, Feed::kBias)) == std::vector<float>{0});
    } else {
      CHECK(feed(*prepared, Feed::kMask).data == nullptr);
      CHECK(elements<float>(feed(*prepared, Feed::kBias)) == std::vector<float>{0, -kInf, 0});
    }
  }
}

TEST_CASE("prefixes and masks that a request leaves out hide nothing and show nothing more") {
  World world;
  Request request("masked");
  request.all({2, 4, 3, 8});
  const auto prepared = prepared_of(world, request);
  CHECK(prepared->work.joinable);
  CHECK(elements<std::int64_t>(feed(*prepared, Feed::kPrefixLengths)) ==
        std::vector<std::int64_t>{0, 0});
  CHECK(elements<std::uint8_t>(feed(*prepared, Feed::kMask)) == std::vector<std::uint8_t>{1});
  CHECK(feed(*prepared, Feed::kCuSeqlensQ).data == nullptr);
}

TEST_CASE("packed sequences run by the graph for them, alone, with a prefix for each") {
  World world;
  Request request("masked");
  request.at(wire::Input::kCuSeqlensQ) = request.lengths({0, 1, 1, 3});
  auto prepared = prepared_of(world, request);
  CHECK(prepared->plan.variant->name() == "packed");
  CHECK(!prepared->work.joinable);
  CHECK(prepared->work.dims.packed == 3);
  CHECK(feed(*prepared, Feed::kCuSeqlensK).data == feed(*prepared, Feed::kCuSeqlensQ).data);
  CHECK(feed(*prepared, Feed::kPrefixLengths).shape == Shape{3});
  request.at(wire::Input::kPrefixLengths) = request.lengths({1, 0, 3});
  prepared = prepared_of(world, request);
  CHECK(elements<std::int64_t>(feed(*prepared, Feed::kPrefixLengths)) ==
        std::vector<std::int64_t>{1, 0, 3});
  request.at(wire::Input::kCuSeqlensK) = request.lengths({0, 2, 2, 2});
  CHECK(status_thrown([&] { prepared_of(world, request); }).message ==
        "cu_seqlens_k[3]: given 2; allowed: 3, all tokens");
}

TEST_CASE("sinks are the request's, by itself, or the model's own") {
  World world;
  Request request("masked");
  auto prepared = prepared_of(world, request);
  CHECK(prepared->work.joinable);
  CHECK(elements<float>(feed(*prepared, Feed::kSinks)) == std::vector<float>{0.5F, -1, 0, 2});
  const auto own_key = prepared->work.key;
  request.at(wire::Input::kSinks) = request.with<float>({4}, DataType::kFp32, {1, -kInf, -3, 0});
  prepared = prepared_of(world, request);
  CHECK(!prepared->work.joinable);
  CHECK(prepared->work.key != own_key);
  CHECK(elements<float>(feed(*prepared, Feed::kSinks)) == std::vector<float>{1, -kInf, -3, 0});
  Request bare("bare");
  CHECK(feed(*prepared_of(world, bare), Feed::kSinks).data == nullptr);
}

TEST_CASE("a log-sum-exp comes with the output or alone, with what weights say or without") {
  World world;
  Request request("masked");
  const auto plain = plan_of(world, request).key;
  request.message.returns.log_sum_exp = true;
  AttendPlan plan = plan_of(world, request);
  CHECK(plan.key != plain);
  CHECK(plan.variant->name() == "native");
  REQUIRE(plan.results.size() == 2);
  CHECK(plan.results[1].output == wire::Output::kLogSumExp);
  CHECK(plan.results[1].dtype == DataType::kFp32);
  CHECK(plan.results[1].shape == Shape{1, 4, 3});
  request.message.returns.no_output = true;
  request.message.returns.entropy = true;
  plan = plan_of(world, request);
  CHECK(plan.variant->name() == "native");
  REQUIRE(plan.diagnosis != nullptr);
  CHECK(plan.diagnosis->name() == "diagnostics");
  REQUIRE(plan.results.size() == 2);
  request.message.returns.log_sum_exp = false;
  plan = plan_of(world, request);
  CHECK(plan.variant->name() == "diagnostics");
}

TEST_CASE("a graph that only caps scores gets the model's own softcap") {
  World world;
  Request request("capped");
  CHECK(elements<float>(feed(*prepared_of(world, request), Feed::kSoftcap)) ==
        std::vector<float>{-1});
  request.message.variant = "softcap";
  CHECK(elements<float>(feed(*prepared_of(world, request), Feed::kSoftcap)) ==
        std::vector<float>{5});
  request.message.softcap = 2.5F;
  CHECK(elements<float>(feed(*prepared_of(world, request), Feed::kSoftcap)) ==
        std::vector<float>{2.5F});
}

TEST_CASE("a scale of the request's own multiplies the query, which stays as it was") {
  World world;
  Request request;
  std::vector<float> ones(96, 1);
  request.query() = request.with({1, 4, 3, 8}, DataType::kFp32, ones);
  request.message.scale = 0.7F;
  const auto prepared = prepared_of(world, request);
  const auto factor = static_cast<float>(static_cast<double>(0.7F) / 0.35355339059327373);
  CHECK(elements<float>(feed(*prepared, Feed::kQuery)) == std::vector<float>(96, factor));
  CHECK(std::memcmp(request.query()->data.data(), ones.data(), 384) == 0);
  CHECK(feed(*prepared, Feed::kKey).data == request.key()->data.data());
}

TEST_CASE(
    "a stored tensor needs neither dtype nor shape, and outlives its lease while it is used") {
  World world;
  Request request;
  const std::string handle = world.store(DataType::kFp32, {1, 4, 3, 8});
  request.key() = request.stored(handle);
  request.value() = request.stored(handle, {1, 4, 3, 8}, 1);
  AttendPlan plan = plan_of(world, request);
  CHECK(plan.request_bytes == 1152);
  CHECK(plan.sent_bytes == 384);
  world.stored.drop(handle, {});
  const auto prepared = prepare(std::move(plan), request.elements(), world.context(), kPeer);
  CHECK(feed(*prepared, Feed::kKey).data == feed(*prepared, Feed::kValue).data);
  CHECK(elements<float>(feed(*prepared, Feed::kKey)) == std::vector<float>(96, 0));
}

TEST_CASE("chunked tensors are announced on a stream, and their size with them") {
  World world;
  Request request;
  request.key() = Request::chunked(384);
  const AttendPlan plan = plan_attend(request.message, world.context(), kPeer, true);
  CHECK(plan.specs[1]->chunked);
  CHECK(plan.sent_bytes == 1152);
  request.key() = Request::chunked(380);
  CHECK(
      status_thrown([&] { plan_attend(request.message, world.context(), kPeer, true); }).message ==
      "key.chunked.byte_size: given 380 bytes; allowed: 384 bytes, as shape [1, 4, 3, 8] of FP32 "
      "takes");
}

TEST_CASE("tensors in shared memory are used there; lengths are copied before they are checked") {
  World world;
  SharedObject object(world);
  Request request;
  request.query() = Request::shared("r", 64, 384);
  request.key_lengths() = Request::shared("r", 1024, 8);
  request.key_lengths()->shape = {1};
  request.key_lengths()->dtype = 4;
  request.message.output_region = {"r", 2048, 384};
  const std::int64_t length = 2;
  std::memcpy(object.at(1024), &length, sizeof length);
  AttendPlan plan = plan_of(world, request);
  CHECK(plan.sent_bytes == 768);
  const auto prepared = prepare(plan, request.elements(), world.context(), kPeer);
  REQUIRE(prepared->output_region);
  CHECK(prepared->output_region->bytes.size() == 384);
  CHECK(prepared->regions.size() == 2);
  const float one = 1;
  std::memcpy(object.at(64), &one, sizeof one);
  std::memset(object.at(1024), 0xFF, sizeof length);
  std::memset(prepared->output_region->bytes.data(), 7, 1);
  CHECK(elements<float>(feed(*prepared, Feed::kQuery))[0] == 1);
  CHECK(elements<std::int64_t>(feed(*prepared, Feed::kKeyLengths)) == std::vector<std::int64_t>{2});
  CHECK(*object.at(2048) == std::byte{7});
  prepared->check_intact();

  CHECK(status_thrown([&] {
          prepare(plan, request.elements(), world.context(), "ipv4:10.0.0.1:5");
        }).code == Code::kPermissionDenied);
  request.key_lengths().reset();
  request.message.output_region = {"r", 3968, 384};
  CHECK(status_thrown([&] { prepared_of(world, request); }).message ==
        "shared_memory region 'r': given offset 3968 and 384 bytes; allowed: 1 or more of its 4096 "
        "bytes");
  request.query() = Request::shared("other", 64, 384);
  CHECK(status_thrown([&] { prepared_of(world, request); }).message ==
        "shared_memory region: given 'other'; allowed: a registered one");
}

TEST_CASE("a tensor to store may be of any dtype and of up to eight dimensions") {
  Request request;
  const auto check = [](const wire::TensorMessage& tensor) {
    return status_thrown([&] { check_tensor(TensorRule{"tensor"}, tensor, true, nullptr); })
        .message;
  };
  CHECK(check(request.tensor({2, 1, 1, 1, 1, 1, 1, 3}, DataType::kBf16)) == "");
  CHECK(check(request.tensor({3}, DataType::kBool)) == "");
  for (const std::int32_t dtype : {-1, 7, 9, 257}) {
    CHECK(check(request.sized({3}, 12, dtype)) ==
          "tensor.dtype: given " + std::to_string(dtype) + "; allowed: a dtype");
  }
  CHECK(check(request.sized({3}, 12, 0)) ==
        "tensor.dtype: given DATA_TYPE_UNSPECIFIED; allowed: a dtype");
  CHECK(check(request.tensor({1, 1, 1, 1, 1, 1, 1, 1, 1})) ==
        "tensor.shape: given one of rank 9; allowed: 1..8 dimensions");
  CHECK(check(request.sized({}, 4)) ==
        "tensor.shape: given []; allowed: 1..8 dimensions, each at least 1");
  CHECK(check(request.stored("abc", {3}, 1)) == "tensor.stored: given abc; allowed: data");
  const TensorSpec spec =
      check_tensor(TensorRule{"tensor"}, request.tensor({2, 3}, DataType::kInt32), true, nullptr);
  CHECK(spec.byte_size == 24);
  CHECK(spec.shape == Shape{2, 3});
}

}  // namespace
}  // namespace attnserve::requests
