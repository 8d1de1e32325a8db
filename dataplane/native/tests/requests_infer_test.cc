#include <doctest/doctest.h>

#include <algorithm>

#include "requests/infer.h"
#include "requests_infer_support.h"

namespace attnserve::requests {
namespace {

using wire::Input;

std::size_t index(Input input) { return static_cast<std::size_t>(input); }

TEST_CASE("a request that names no outputs gets the model's main one") {
  World world;
  Infer request;
  const InferPlan plan = request.plan(world);
  REQUIRE(plan.outputs.size() == 1);
  CHECK(plan.outputs[0].result == 0);
  CHECK(plan.attend.variant->name() == "native");
  CHECK(plan.elements[index(Input::kKey)].data() == request.message.raw_input_contents[1].data());
  CHECK(plan.memory.empty());
  CHECK(plan.timeout == 0);
  const auto outputs = answer_outputs(plan, world.limits);
  REQUIRE(outputs.size() == 1);
  CHECK(outputs[0].name == "output");
  CHECK(outputs[0].datatype == "FP32");
  CHECK(outputs[0].shape == Shape{1, 4, 3, 8});
  CHECK(outputs[0].byte_size == 384);
  CHECK(!outputs[0].shared);
}

TEST_CASE("outputs come in the order asked for, whatever else is computed for them") {
  World world;
  Infer request;
  for (const char* name : {"mass_per_key", "top_k_weights", "weights"}) request.ask(name);
  request.set("top_k", integer(2));
  const InferPlan plan = request.plan(world);
  CHECK(plan.attend.results.size() == 4);  // with top_k_indices
  std::vector<std::string> names;
  for (const auto& output : answer_outputs(plan, world.limits)) names.emplace_back(output.name);
  CHECK(names == std::vector<std::string>{"mass_per_key", "top_k_weights", "weights"});
  CHECK(!plan.attend.wanted.output);
}

TEST_CASE("parameters that nobody knows are ignored, of requests, inputs and outputs") {
  World world;
  Infer request;
  request.set("binary_data_size", integer(1152));
  request.set("sequence_id", integer(3));
  request.set("triton_enable_empty_final_response", true);
  request.query().parameters = {{"binary_data_size", integer(384)},
                                {"shared_memory_colour", word("x")}};
  request.ask("output", {{"binary_data", true}});
  const InferPlan plan = request.plan(world);
  CHECK(!plan.outputs[0].region);
  CHECK(plan.outputs[0].parameters.empty());
}

TEST_CASE("what the parameters ask for goes into the plan") {
  World world;
  Infer request;
  request.set("scale", 0.7);
  request.set("softcap", integer(3));
  request.set("variant", word("softcap"));
  request.set("priority", std::uint64_t{1});
  request.set("timeout", integer(5000));
  const InferPlan plan = request.plan(world);
  CHECK(plan.attend.query_factor == static_cast<double>(0.7F) / 0.35355339059327373);
  CHECK(plan.attend.softcap == 3.0F);
  CHECK(plan.attend.variant->name() == "softcap");
  CHECK(plan.attend.priority == kHigh);
  CHECK(plan.timeout == 5000);
}

TEST_CASE("elements that came one by one live in the plan, with what they are charged") {
  World world;
  ByteBudget budget(1000);
  Infer request;
  const std::vector<float> ones(96, 1);
  request.message.raw_input_contents.clear();
  for (wire::InferInput& input : request.message.inputs) {
    input.contents = Infer::contents({"fp32_contents"}, DataType::kFp32, ones);
    input.contents->elements.lease = Lease(budget);
    input.contents->elements.lease.grow_or_throw(300);
  }
  const InferPlan plan = request.plan(world);
  REQUIRE(plan.memory.size() == 3);
  request.message.inputs.clear();
  CHECK(budget.lent() == 900);
  CHECK(std::memcmp(plan.elements[index(Input::kValue)].data(), ones.data(), 384) == 0);
}

TEST_CASE("inputs and outputs may lie in shared memory") {
  World world;
  SharedObject object(world);
  Infer request;
  request.share(region_parameters(
      {{"region", word("r")}, {"byte_size", std::uint64_t{384}}, {"offset", integer(3)}}));
  request.ask("entropy");
  request.ask(
      "output",
      region_parameters({{"region", word("r")}, {"byte_size", integer(2000)}, {"offset", kUnset}}));
  const InferPlan plan = request.plan(world);
  CHECK(plan.regions.size() == 2);
  CHECK(plan.attend.sent_bytes == 768);
  CHECK(plan.attend.request_bytes == 1152);
  *object.at(3) = std::byte{9};
  CHECK(plan.elements[index(Input::kQuery)][0] == std::byte{9});
  const AskedOutput& output = plan.outputs[1];
  REQUIRE(output.region);
  CHECK(output.region->byte_size == 2000);
  CHECK(output.place.size() == 2000);
  output.place[1] = std::byte{8};
  CHECK(*object.at(1) == std::byte{8});
  const auto outputs = answer_outputs(plan, world.limits);
  CHECK(!outputs[0].shared);
  CHECK(outputs[1].shared);
  const wire::Parameters expected{{"shared_memory_region", word("r")},
                                  {"shared_memory_byte_size", integer(384)},
                                  {"shared_memory_offset", kUnset}};
  CHECK(outputs[1].parameters == expected);
  for (const sessions::RegionView& region : plan.regions) region.check_intact();
}

TEST_CASE("lengths in shared memory are copied before they are checked") {
  World world;
  SharedObject object(world);
  Infer request;
  request.message.inputs.push_back(
      {"key_lengths",
       "INT64",
       {1},
       region_parameters({{"region", word("r")}, {"byte_size", integer(8)}}),
       {}});
  const std::int64_t length = 2;
  std::memcpy(object.at(0), &length, sizeof length);
  const InferPlan plan = request.plan(world);
  std::memset(object.at(0), 0xFF, sizeof length);
  CHECK(std::memcmp(plan.elements[index(Input::kKeyLengths)].data(), &length, sizeof length) == 0);
}

TEST_CASE("an answer that goes into shared memory may be larger than a message") {
  World world;
  SharedObject object(world);
  Infer request({1, 4, 600, 8});
  request.ask("weights");
  request.ask("entropy", region_parameters({{"region", word("r")}, {"byte_size", integer(4096)}}));
  const InferPlan plan = request.plan(world);
  CHECK(status_thrown([&] { answer_outputs(plan, world.limits); }).message ==
        "entropy.shared_memory_byte_size: given 4096 bytes; allowed: at least 9600 bytes, as shape "
        "[1, 4, 600] takes");
}

TEST_CASE("thousands of unknown inputs cost little") {
  World world;
  Infer request;
  std::vector<std::string> names;
  for (int i = 0; i < 4000; ++i) names.push_back("name" + std::to_string(i));
  for (const std::string& name : names) {
    request.message.inputs.push_back({name, "FP32", {1}, {}, {}});
    request.message.raw_input_contents.emplace_back();
  }
  CHECK(status_thrown([&] { request.plan(world); }).message ==
        "inputs: given 'name0'; allowed: query, key, value, key_lengths, bias for causal");
}

}  // namespace
}  // namespace attnserve::requests
