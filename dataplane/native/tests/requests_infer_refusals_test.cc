#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "requests/infer.h"
#include "requests_infer_support.h"

namespace attnserve::requests {
namespace {

struct Refusal {
  std::string name;
  std::function<void(Infer&)> change;  // to a request that would be answered
  Code code;
  std::string message;
};

const std::string kLongName = [] {
  std::string name;
  for (int i = 0; i < 100; ++i) name += "\xC3\xA9";
  return name;
}();

// The messages are the API's: callers have read them since the first version.
const std::vector<Refusal> kRefusals{
    {"no inputs",
     [](Infer& r) {
       r.message.inputs.clear();
       r.message.raw_input_contents.clear();
     },
     Code::kInvalidArgument, "query: given nothing; allowed: [B, H, Sq, D] for core models"},
    {"unknown input", [](Infer& r) { r.add("mask", {1}); }, Code::kInvalidArgument,
     "inputs: given 'mask'; allowed: query, key, value, key_lengths, bias for causal"},
    {"unknown input of a layer",
     [](Infer& r) {
       r.model = "self";
       r.add("mask", {1});
     },
     Code::kInvalidArgument, "inputs: given 'mask'; allowed: hidden_states, key_lengths for self"},
    {"an input of layers", [](Infer& r) { r.add("context", {1}); }, Code::kInvalidArgument,
     "context: given a tensor; allowed: query, key, value for model causal"},
    {"endless name", [](Infer& r) { r.add(kLongName, {1}); }, Code::kInvalidArgument,
     "inputs: given "
     "'éééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééé'; allowed: "
     "query, key, value, key_lengths, bias for causal"},
    {"input twice", [](Infer& r) { r.add("key", {1}); }, Code::kInvalidArgument,
     "inputs: given 'key' twice; allowed: each name once"},
    {"unknown input twice",
     [](Infer& r) {
       r.add("it's", {1});
       r.add("it's", {1});
     },
     Code::kInvalidArgument, "inputs: given \"it's\" twice; allowed: each name once"},
    {"too few raw contents", [](Infer& r) { r.message.raw_input_contents.pop_back(); },
     Code::kInvalidArgument,
     "raw_input_contents: given 2; allowed: 3, one for each input that has neither contents nor "
     "shared memory"},
    {"too many raw contents", [](Infer& r) { r.message.raw_input_contents.emplace_back(); },
     Code::kInvalidArgument,
     "raw_input_contents: given 4; allowed: 3, one for each input that has neither contents nor "
     "shared memory"},
    {"raw and typed",
     [](Infer& r) {
       r.query().contents = Infer::contents<float>({"fp32_contents"}, DataType::kFp32, {1});
     },
     Code::kInvalidArgument,
     "query.contents: given elements, and raw_input_contents; allowed: one of them"},
    {"typed and shared",
     [](Infer& r) {
       r.typed<float>("FP32", {"fp32_contents"}, DataType::kFp32, {1});
       r.query().parameters =
           region_parameters({{"region", word("r")}, {"byte_size", integer(384)}});
     },
     Code::kInvalidArgument,
     "query.contents: given elements, and shared memory; allowed: one of them"},
    {"typed FP16",
     [](Infer& r) { r.typed<float>("FP16", {"fp32_contents"}, DataType::kFp32, {1}); },
     Code::kInvalidArgument,
     "query.contents: given ['fp32_contents']; allowed: raw_input_contents: FP16 travels raw"},
    {"typed BF16, empty", [](Infer& r) { r.typed<float>("BF16", {}, DataType::kUnspecified, {}); },
     Code::kInvalidArgument,
     "query.contents: given []; allowed: raw_input_contents: BF16 travels raw"},
    {"contents of another type",
     [](Infer& r) { r.typed<float>("FP32", {"fp64_contents"}, DataType::kUnspecified, {}); },
     Code::kInvalidArgument,
     "query.contents: given ['fp64_contents']; allowed: fp32_contents for FP32"},
    {"contents of two types",
     [](Infer& r) {
       r.typed<float>("FP32", {"int_contents", "fp32_contents"}, DataType::kUnspecified, {});
     },
     Code::kInvalidArgument,
     "query.contents: given ['int_contents', 'fp32_contents']; allowed: fp32_contents for FP32"},
    {"too few typed",
     [](Infer& r) { r.typed<float>("FP32", {"fp32_contents"}, DataType::kFp32, {1}); },
     Code::kInvalidArgument,
     "query.data: given 4 bytes; allowed: 128 bytes, as shape [1, 4, 1, 8] of FP32 takes"},
    {"typed, wrong datatype",
     [](Infer& r) { r.typed<std::int64_t>("INT64", {"int64_contents"}, DataType::kInt64, {1}); },
     Code::kInvalidArgument, "query.dtype: given INT64; allowed: FP32"},
    {"no typed", [](Infer& r) { r.typed<float>("FP32", {}, DataType::kUnspecified, {}); },
     Code::kInvalidArgument, "query.contents: given nothing; allowed: fp32_contents for FP32"},
    {"unknown datatype", [](Infer& r) { r.query().datatype = "FP8"; }, Code::kInvalidArgument,
     "query.datatype: given 'FP8'; allowed: FP32, FP16, BF16, INT64, INT32, BOOL"},
    {"no datatype", [](Infer& r) { r.query().datatype = ""; }, Code::kInvalidArgument,
     "query.datatype: given ''; allowed: FP32, FP16, BF16, INT64, INT32, BOOL"},
    {"wrong datatype", [](Infer& r) { r.query().datatype = "FP16"; }, Code::kInvalidArgument,
     "query.dtype: given FP16; allowed: FP32"},
    {"bytes and shape", [](Infer& r) { r.query().shape[2] = 4; }, Code::kInvalidArgument,
     "query.data: given 384 bytes; allowed: 512 bytes, as shape [1, 4, 4, 8] of FP32 takes"},
    {"negative shape", [](Infer& r) { r.query().shape[2] = -3; }, Code::kInvalidArgument,
     "query.shape: given [1, 4, -3, 8]; allowed: [B, H, Sq, D], each at least 1"},
    {"overflowing shape", [](Infer& r) { r.query().shape[2] = 1LL << 62; }, Code::kInvalidArgument,
     "query.shape: given [1, 4, 4611686018427387904, 8], 590295810358705651712 bytes; allowed: "
     "less than 2^63 bytes"},
    {"rank", [](Infer& r) { r.query().shape.pop_back(); }, Code::kInvalidArgument,
     "query.shape: given [1, 4, 3] of rank 3; allowed: rank 4, [B, H, Sq, D]"},
    {"key lengths", [](Infer& r) { r.add_lengths(4); }, Code::kInvalidArgument,
     "key_lengths[0]: given 4; allowed: 0..3"},
    {"unknown output", [](Infer& r) { r.ask("logits"); }, Code::kInvalidArgument,
     "outputs: given 'logits'; allowed: output, weights, entropy, top_k_indices, top_k_weights, "
     "mass_per_key, mass_by_distance for causal"},
    {"two unknown outputs",
     [](Infer& r) {
       r.ask("logits");
       r.ask("hidden");
     },
     Code::kInvalidArgument,
     "outputs: given 'hidden'; allowed: output, weights, entropy, top_k_indices, top_k_weights, "
     "mass_per_key, mass_by_distance for causal"},
    {"output twice",
     [](Infer& r) {
       r.ask("output");
       r.ask("output");
     },
     Code::kInvalidArgument, "outputs: given 'output' twice; allowed: each name once"},
    {"unknown output twice",
     [](Infer& r) {
       r.ask("x");
       r.ask("x");
     },
     Code::kInvalidArgument, "outputs: given 'x' twice; allowed: each name once"},
    {"classification", [](Infer& r) { r.ask("output", {{"classification", integer(1)}}); },
     Code::kInvalidArgument,
     "output.parameters: given 'classification'; allowed: shared_memory_region, "
     "shared_memory_byte_size, shared_memory_offset"},
    {"top_k missing", [](Infer& r) { r.ask("top_k_indices"); }, Code::kInvalidArgument,
     "parameters['top_k']: given 'nothing'; allowed: 1 or more with output top_k_indices or "
     "top_k_weights"},
    {"top_k unused",
     [](Infer& r) {
       r.ask("output");
       r.set("top_k", integer(2));
     },
     Code::kInvalidArgument,
     "parameters['top_k']: given 2; allowed: nothing without output top_k_indices or "
     "top_k_weights"},
    {"top_k too high",
     [](Infer& r) {
       r.ask("top_k_indices");
       r.set("top_k", integer(4));
     },
     Code::kInvalidArgument, "returns.top_k: given 4; allowed: 0..3, the number of keys"},
    {"top_k far too high",
     [](Infer& r) {
       r.ask("top_k_indices");
       r.set("top_k", integer(1LL << 40));
     },
     Code::kInvalidArgument,
     "parameters['top_k']: given 1099511627776; allowed: 0..4294967295, as int64_param"},
    {"top_k true", [](Infer& r) { r.set("top_k", true); }, Code::kInvalidArgument,
     "parameters['top_k']: given True; allowed: 0..4294967295, as int64_param"},
    {"mass_by_distance missing", [](Infer& r) { r.ask("mass_by_distance"); },
     Code::kInvalidArgument,
     "parameters['mass_by_distance']: given 'nothing'; allowed: 1 or more with output "
     "mass_by_distance"},
    {"mass_by_distance unused",
     [](Infer& r) {
       r.ask("entropy");
       r.set("mass_by_distance", integer(3));
     },
     Code::kInvalidArgument,
     "parameters['mass_by_distance']: given 3; allowed: nothing without output mass_by_distance"},
    {"scale a word", [](Infer& r) { r.set("scale", word("big")); }, Code::kInvalidArgument,
     "parameters['scale']: given 'big'; allowed: a number, as double_param or int64_param"},
    {"scale true", [](Infer& r) { r.set("scale", true); }, Code::kInvalidArgument,
     "parameters['scale']: given True; allowed: a number, as double_param or int64_param"},
    {"scale nothing", [](Infer& r) { r.set("scale", kUnset); }, Code::kInvalidArgument,
     "parameters['scale']: given None; allowed: a number, as double_param or int64_param"},
    {"scale zero", [](Infer& r) { r.set("scale", 0.0); }, Code::kInvalidArgument,
     "scale: given 0.0; allowed: a finite number above 0"},
    {"scale huge", [](Infer& r) { r.set("scale", 1e300); }, Code::kInvalidArgument,
     "scale: given inf; allowed: a finite number above 0"},
    {"scale a negative number", [](Infer& r) { r.set("scale", integer(-3)); },
     Code::kInvalidArgument, "scale: given -3.0; allowed: a finite number above 0"},
    {"softcap NaN", [](Infer& r) { r.set("softcap", std::numeric_limits<double>::quiet_NaN()); },
     Code::kInvalidArgument, "softcap: given nan; allowed: a finite number, 0 (off) or more"},
    {"softcap a word", [](Infer& r) { r.set("softcap", word("it's \"big\"")); },
     Code::kInvalidArgument,
     "parameters['softcap']: given 'it\\'s \"big\"'; allowed: a number, as double_param or "
     "int64_param"},
    {"variant a number", [](Infer& r) { r.set("variant", integer(1)); }, Code::kInvalidArgument,
     "parameters['variant']: given 1; allowed: a name, as string_param"},
    {"variant a double", [](Infer& r) { r.set("variant", 0.5); }, Code::kInvalidArgument,
     "parameters['variant']: given 0.5; allowed: a name, as string_param"},
    {"unknown variant", [](Infer& r) { r.set("variant", word("x")); }, Code::kNotFound,
     "variant: given 'x'; model causal version 1 has: native, fused, reference, softcap, "
     "diagnostics"},
    {"priority", [](Infer& r) { r.set("priority", std::uint64_t{4}); }, Code::kInvalidArgument,
     "parameters['priority']: given 4; allowed: 0..3, as int64_param"},
    {"priority negative", [](Infer& r) { r.set("priority", integer(-1)); }, Code::kInvalidArgument,
     "parameters['priority']: given -1; allowed: 0..3, as int64_param"},
    {"timeout", [](Infer& r) { r.set("timeout", integer(-1)); }, Code::kInvalidArgument,
     "parameters['timeout']: given -1; allowed: 0..9223372036854775807, as int64_param"},
    {"timeout too long", [](Infer& r) { r.set("timeout", std::uint64_t{1} << 63); },
     Code::kInvalidArgument,
     "parameters['timeout']: given 9223372036854775808; allowed: 0..9223372036854775807, as "
     "int64_param"},
    {"empty parameter", [](Infer& r) { r.set("timeout", kUnset); }, Code::kInvalidArgument,
     "parameters['timeout']: given None; allowed: 0..9223372036854775807, as int64_param"},
    {"region without a name",
     [](Infer& r) { r.share(region_parameters({{"byte_size", integer(384)}})); },
     Code::kInvalidArgument,
     "query.shared_memory_region: given None; allowed: a registered name, as string_param"},
    {"region of no value", [](Infer& r) { r.share(region_parameters({{"region", kUnset}})); },
     Code::kInvalidArgument,
     "query.shared_memory_region: given None; allowed: a registered name, as string_param"},
    {"region a number", [](Infer& r) { r.share(region_parameters({{"region", integer(1)}})); },
     Code::kInvalidArgument,
     "query.shared_memory_region: given 1; allowed: a registered name, as string_param"},
    {"region's name empty",
     [](Infer& r) {
       r.share(region_parameters({{"region", word("")}, {"byte_size", integer(384)}}));
     },
     Code::kInvalidArgument,
     "query.shared_memory_region: given ''; allowed: a registered name, as string_param"},
    {"region unknown",
     [](Infer& r) {
       r.share(region_parameters({{"region", word("other")}, {"byte_size", integer(384)}}));
     },
     Code::kNotFound, "shared_memory region: given 'other'; allowed: a registered one"},
    {"region's size missing", [](Infer& r) { r.share(region_parameters({{"region", word("r")}})); },
     Code::kInvalidArgument,
     "query.shared_memory_byte_size: given None; allowed: a number, as int64_param"},
    {"region's size a word",
     [](Infer& r) {
       r.share(region_parameters({{"region", word("r")}, {"byte_size", word("x")}}));
     },
     Code::kInvalidArgument,
     "query.shared_memory_byte_size: given 'x'; allowed: a number, as int64_param"},
    {"region's offset a double",
     [](Infer& r) {
       r.share(region_parameters(
           {{"region", word("r")}, {"byte_size", integer(384)}, {"offset", 0.5}}));
     },
     Code::kInvalidArgument,
     "query.shared_memory_offset: given 0.5; allowed: a number, as int64_param"},
    {"region's size",
     [](Infer& r) {
       r.share(region_parameters({{"region", word("r")}, {"byte_size", integer(380)}}));
     },
     Code::kInvalidArgument,
     "query.data: given 380 bytes; allowed: 384 bytes, as shape [1, 4, 3, 8] of FP32 takes"},
    {"region's size zero",
     [](Infer& r) {
       r.share(region_parameters({{"region", word("r")}, {"byte_size", integer(0)}}));
     },
     Code::kInvalidArgument,
     "shared_memory region 'r': given offset 0 and 0 bytes; allowed: 1 or more of its 4096 bytes"},
    {"region's size negative",
     [](Infer& r) {
       r.share(region_parameters({{"region", word("r")}, {"byte_size", integer(-384)}}));
     },
     Code::kInvalidArgument,
     "shared_memory region 'r': given offset 0 and -384 bytes; allowed: 1 or more of its 4096 "
     "bytes"},
    {"region's offset negative",
     [](Infer& r) {
       r.share(region_parameters(
           {{"region", word("r")}, {"byte_size", integer(384)}, {"offset", integer(-64)}}));
     },
     Code::kInvalidArgument,
     "shared_memory region 'r': given offset -64 and 384 bytes; allowed: 1 or more of its 4096 "
     "bytes"},
    {"unknown region's offset negative",
     [](Infer& r) {
       r.share(region_parameters(
           {{"region", word("other")}, {"byte_size", integer(384)}, {"offset", integer(-64)}}));
     },
     Code::kNotFound, "shared_memory region: given 'other'; allowed: a registered one"},
    {"beyond the region",
     [](Infer& r) {
       r.share(region_parameters(
           {{"region", word("r")}, {"byte_size", integer(384)}, {"offset", integer(4000)}}));
     },
     Code::kInvalidArgument,
     "shared_memory region 'r': given offset 4000 and 384 bytes; allowed: 1 or more of its 4096 "
     "bytes"},
    {"output's region unknown",
     [](Infer& r) {
       r.ask("output", region_parameters({{"region", word("other")}, {"byte_size", integer(384)}}));
     },
     Code::kNotFound, "shared_memory region: given 'other'; allowed: a registered one"},
    {"output's region too small",
     [](Infer& r) {
       r.ask("output", region_parameters({{"region", word("r")}, {"byte_size", integer(383)}}));
     },
     Code::kInvalidArgument,
     "output.shared_memory_byte_size: given 383 bytes; allowed: at least 384 bytes, as shape [1, "
     "4, 3, 8] takes"},
    {"output's region before inputs",
     [](Infer& r) {
       r.ask("output", region_parameters({{"region", word("other")}, {"byte_size", integer(384)}}));
       r.add("key", {1});
     },
     Code::kNotFound, "shared_memory region: given 'other'; allowed: a registered one"},
    {"answer too large",
     [](Infer& r) {
       r = Infer({1, 4, 600, 8});
       r.ask("weights");
     },
     Code::kResourceExhausted,
     "response size: its tensors take 5760000 bytes; allowed in one message: 4194304 "
     "(--max-message-mib); have the outputs put into shared memory, or use AttendStream"},
    {"part of an answer too large",
     [](Infer& r) {
       r = Infer({1, 4, 600, 8});
       r.ask("weights");
       r.ask("output", region_parameters({{"region", word("r")}, {"byte_size", integer(4096)}}));
     },
     Code::kInvalidArgument,
     "output.shared_memory_byte_size: given 4096 bytes; allowed: at least 76800 bytes, as shape "
     "[1, 4, 600, 8] takes"},
    {"top_k_weights, count",
     [](Infer& r) {
       r.ask("output");
       r.ask("top_k_weights");
     },
     Code::kInvalidArgument,
     "parameters['top_k']: given 'nothing'; allowed: 1 or more with output top_k_indices or "
     "top_k_weights"},
    {"scale to a layer",
     [](Infer& r) {
       r.to_layer();
       r.set("scale", 0.1);
     },
     Code::kInvalidArgument, "scale: given 0.10000000149011612; allowed: nothing for layer models"},
    {"caller on another host",
     [](Infer& r) {
       r.peer = "ipv4:10.0.0.1:5";
       r.share(region_parameters({{"region", word("r")}, {"byte_size", integer(384)}}));
     },
     Code::kPermissionDenied,
     "shared memory: given by a caller at ipv4:10.0.0.1:5; allowed: callers on this host, over "
     "loopback or a Unix socket"},
};

TEST_CASE("a bad request of the Open Inference Protocol is refused in the same words") {
  for (const Refusal& refusal : kRefusals) {
    CAPTURE(refusal.name);
    World world;
    const SharedObject object(world);
    Infer request;
    refusal.change(request);
    const Status status = status_thrown([&] {
      InferPlan plan = request.plan(world);
      prepare(plan.attend, plan.elements, world.context(), kPeer);
      answer_outputs(plan, world.limits);
    });
    CHECK(name_of(status.code) == name_of(refusal.code));
    CHECK(status.message == refusal.message);
  }
}

TEST_CASE("a transformer is not this protocol's attention") {
  World world;
  Infer request;
  request.model = "bert";
  CHECK(status_thrown([&] { request.plan(world); }).code == Code::kFailedPrecondition);
}

}  // namespace
}  // namespace attnserve::requests
