#include <doctest/doctest.h>

#include <functional>

#include "base/status.h"
#include "fake_session.h"
#include "onnx_model.h"

using namespace attnserve;
using namespace attnserve::engine;

namespace {

using Names = std::vector<std::string_view>;

const Names kTensors = {"query", "key", "value"};

// fused: takes lengths, gives the output; reference: takes bias too, gives weights; native: any
// bias.
std::shared_ptr<Model> three_variants() {
  auto model = std::make_shared<Model>();
  model->facts.name = "causal";
  model->facts.version = 3;
  model->version_text = "3";
  const std::vector<std::string> takes = {"query", "key", "value", "key_lengths"};
  std::vector<std::string> biased = takes;
  biased.push_back("bias");
  add_variant(*model, "fused",
              std::make_unique<FakeSession>(takes, std::vector<std::string>{"output"}));
  add_variant(*model, "reference",
              std::make_unique<FakeSession>(biased, std::vector<std::string>{"output", "weights"}));
  add_variant(*model, "native",
              std::make_unique<FakeSession>(biased, std::vector<std::string>{"output"}));
  return model;
}

Status status_of_call(const std::function<void()>& call) {
  try {
    call();
  } catch (const RequestError& error) {
    return error.status();
  }
  return {};
}

ModelPtr named_model(std::string name, std::int64_t version) {
  auto model = std::make_shared<Model>();
  model->facts.name = std::move(name);
  model->facts.version = version;
  return model;
}

}  // namespace

TEST_CASE("without picks the first variant that can do it is chosen") {
  const auto model = three_variants();
  CHECK(model->choose("", kTensors, Names{"output"}, 5).name() == "fused");
  CHECK(model->choose("", kTensors, Names{"output", "weights"}, 5).name() == "reference");
  CHECK(model->choose("", Names{"query", "bias"}, Names{"output"}, 5).name() == "reference");
  CHECK(model->choose("native", kTensors, Names{"output"}, 5).name() == "native");
}

TEST_CASE("picks put variants first up to a length, the others after them") {
  const auto model = three_variants();
  model->picks = {
      {8, {"native", "absent"}}, {64, {"reference", "native"}}, {std::nullopt, {"fused"}}};
  const auto chosen = [&](std::int64_t length, const Names& outputs = {"output"}) {
    return model->choose("", kTensors, outputs, length).name();
  };
  CHECK(chosen(1) == "native");
  CHECK(chosen(8) == "native");
  CHECK(chosen(9) == "reference");
  CHECK(chosen(64) == "reference");
  CHECK(chosen(65) == "fused");
  CHECK(chosen(1, {"weights"}) == "reference");
}

TEST_CASE("a variant that is not there is NOT_FOUND, with those that are") {
  const auto model = three_variants();
  const Status status =
      status_of_call([&] { model->choose("fast", kTensors, Names{"output"}, 5); });
  CHECK(status.code == Code::kNotFound);
  CHECK(status.message ==
        "variant: given 'fast'; model causal version 3 has: fused, reference, native");
}

TEST_CASE("what no variant can do is FAILED_PRECONDITION, with what is lacking") {
  const auto model = three_variants();
  const auto said = [&](std::string_view forced, const Names& inputs, const Names& outputs) {
    const Status status = status_of_call([&] { model->choose(forced, inputs, outputs, 5); });
    CHECK(status.code == Code::kFailedPrecondition);
    return status.message;
  };
  CHECK(said("fused", {"query", "bias"}, {"output", "weights"}) ==
        "variant 'fused' of model causal version 3 cannot do this: it takes no bias; "
        "it gives no weights");
  CHECK(said("", {"softcap", "query", "slopes"}, {"output"}) ==
        "model causal version 3 cannot do this: it takes no slopes, softcap");
  CHECK(said("native", {"query"}, {"weights", "entropy"}) ==
        "variant 'native' of model causal version 3 cannot do this: it gives no entropy, weights");

  Model apart;
  apart.facts.name = "m";
  apart.version_text = "1";
  add_variant(apart, "a",
              std::make_unique<FakeSession>(std::vector<std::string>{"bias"},
                                            std::vector<std::string>{"output"}));
  add_variant(apart, "b",
              std::make_unique<FakeSession>(std::vector<std::string>{"query"},
                                            std::vector<std::string>{"weights"}));
  CHECK(status_of_call([&] { apart.choose("", Names{"bias"}, Names{"weights"}, 1); }).message ==
        "model m version 1 cannot do this: no single variant takes and gives all of it");
}

TEST_CASE("find and named give nothing where there is nothing") {
  const auto model = three_variants();
  CHECK(model->find(kTensors, Names{"weights"})->name() == "reference");
  CHECK(model->find(kTensors, Names{"entropy"}) == nullptr);
  CHECK(model->named("native")->name() == "native");
  CHECK(model->named("") == nullptr);
}

TEST_CASE("an empty version is the highest") {
  ModelStore store;
  store.put("a", {named_model("a", 2), named_model("a", 10), named_model("a", 1)});
  CHECK(store.get("a", "")->facts.version == 10);
  CHECK(store.get("a", "2")->facts.version == 2);
  CHECK(store.get("a", "0002")->facts.version == 2);
}

TEST_CASE("models and versions that are not there are NOT_FOUND, with those that are") {
  ModelStore store;
  const auto said = [&](std::string_view name, std::string_view version) {
    const Status status = status_of_call([&] { store.get(name, version); });
    CHECK(status.code == Code::kNotFound);
    return status.message;
  };
  CHECK(said("x", "") == "model: given 'x'; models here: none");
  store.put("b", {named_model("b", 2), named_model("b", 10)});
  store.put("a", {named_model("a", 1)});
  CHECK(said("x'y", "") == "model: given \"x'y\"; models here: a, b");
  for (const char* version : {"3", "0", "-2", " 2", "2.0", "two", "٢", "99999999999999999999",
                              "9999999999999999999", "00000000000000000002"}) {
    CHECK(said("b", version) ==
          "version: given '" + std::string(version) + "'; versions of b: 2, 10");
  }
  std::string shown, given;
  for (int i = 0; i < 100; ++i) {
    given += "ä";
    if (i < 80) shown += "ä";
  }
  CHECK(said("b", given) == "version: given '" + shown + "'; versions of b: 2, 10");
}

TEST_CASE("an unloaded model is UNAVAILABLE until it is loaded again; who holds it goes on") {
  ModelStore store;
  store.put("a", {named_model("a", 1)});
  const ModelPtr held = store.get("a", "1");
  store.put("a", {});
  const Status status = status_of_call([&] { store.get("a", ""); });
  CHECK(status.code == Code::kUnavailable);
  CHECK(status.message == "model: a is unloaded; load it, or call another");
  CHECK(held->facts.name == "a");
  store.put("a", {named_model("a", 2)});
  CHECK(store.get("a", "")->facts.version == 2);
  CHECK(status_of_call([&] { store.get("a", "1"); }).code == Code::kNotFound);
}

TEST_CASE("a model that does not load says why until it does") {
  ModelStore store;
  store.put("a", {}, "a/1/model.json: not JSON");
  const Status status = status_of_call([&] { store.get("a", "1"); });
  CHECK(status.code == Code::kFailedPrecondition);
  CHECK(status.message == "model: a is not served: a/1/model.json: not JSON");
  store.put("a", {});
  CHECK(status_of_call([&] { store.get("a", ""); }).code == Code::kUnavailable);
  store.put("a", {named_model("a", 1)});
  CHECK(store.get("a", "")->facts.version == 1);
}

TEST_CASE("working memory: scores for quadratic variants, tiles for native ones, else blocks") {
  const auto model = three_variants();
  Variant& variant = *model->variants[0];
  const auto needed = [&](std::int64_t length) {
    return working_bytes(*model, variant, 2, 8, length, length, 1000);
  };
  CHECK(needed(100) == 6 * 4 * 2 * 8 * 100 * 100);
  CHECK(needed(std::int64_t{1} << 40) == std::numeric_limits<std::size_t>::max());
  variant.facts.quadratic = false;
  CHECK(needed(100) == (128 << 20) + 4000);
  variant.facts.native = true;
  CHECK(needed(100) == (16 << 20) + 2000);

  variant.facts.native = false;
  variant.facts.name = "blocked";
  model->facts.mask = Mask::kCausal;
  model->on_cuda = true;
  CHECK(needed(100) == (128 << 20) + 4000 + 34 * 4 * 2 * 8 * 100 * 100);
  // Linear in the length: 16 queries of 16 rows, 64 MiB of scores.
  CHECK(needed(65'536) == (128U << 20) + 4000 + 34 * (std::size_t{64} << 20));
  model->facts.window = 5;
  CHECK(needed(100) == (128 << 20) + 4000);
}

TEST_CASE("all variants of a model are loaded; one that does not is named") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const GraphFile native(serialized(attention_graph(kOnnxFloat, 1, true)));
  const GraphFile diagnostics(serialized(diagnostics_graph(1, true)));
  ModelFacts facts;
  facts.name = "m";
  facts.version = 7;
  const auto model = load_model(
      runtime, facts,
      {{"native", native.path(), false, true}, {"diagnostics", diagnostics.path(), false, true}},
      {}, {});
  CHECK(model->version_text == "7");
  CHECK(model->named("native")->session->any_heads());
  CHECK(model->named("diagnostics")->session->gives("entropy"));
  CHECK_FALSE(model->on_cuda);

  const GraphFile broken("nothing");
  CHECK_THROWS_WITH_AS(load_model(runtime, facts, {{"broken", broken.path(), true, false}}, {}, {}),
                       doctest::Contains((broken.path() + ": does not load: ").c_str()),
                       std::runtime_error);
}
