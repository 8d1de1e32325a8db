#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "requests/kv_sessions.h"
#include "requests/tensor_spec.h"
#include "requests_support.h"

namespace attnserve::requests {
namespace {

constexpr std::size_t kPageTokens = 16;

const std::vector<std::string> kHeads{"query", "key", "value", "cache", "weights_of", "sinks"};

void add_paged(World& world, engine::ModelFacts facts, bool on_cuda = false,
               const std::vector<std::string>& inputs = kHeads) {
  const auto model = model_of(std::move(facts));
  add(*model, "native", {"query", "key", "value"}, {"output"}, true);
  add(*model, "paged", inputs, {"output"}, true);
  model->on_cuda = on_cuda;
  world.models.put(model->facts.name, {model});
}

// Models whose sessions can be kept, beside those that every World has.
struct Paged : World {
  Paged() {
    engine::ModelFacts facts = core_facts("llama");
    facts.num_kv_heads = 2;
    facts.value_head_dim = 6;
    add_paged(*this, facts);
    facts.name = "windowed";
    facts.window = 100;
    facts.dtype = DataType::kBf16;
    add_paged(*this, facts);
    facts = core_facts("encoder");
    facts.mask = engine::Mask::kBidirectional;
    facts.dtype = DataType::kFp16;
    add_paged(*this, facts);
    add_paged(*this, core_facts("gpu"), true);
    add_paged(*this, core_facts("old"), false, {"query", "key", "value", "cache"});
    facts = core_facts("long");
    facts.value_head_dim = 9;
    add_paged(*this, facts);
    facts = core_facts("turning");
    add_paged(*this, facts, false, {"query", "key", "value", "positions", "cache", "weights_of"});
    facts.kind = engine::Kind::kLayer;
    facts.num_kv_heads = 2;
    facts.embed_dim = 32;
    const auto add_layer = [&](const char* name) {
      facts.name = name;
      add_paged(*this, facts, false, {"hidden_states", "positions", "cache", "weights_of"});
    };
    add_layer("block");
    add_layer("other-block");
    facts.window = 100;
    add_layer("windowed-block");
    facts.window.reset();
    facts.dtype = DataType::kFp16;
    add_layer("half-block");
    facts.dtype = DataType::kFp32;
    facts.embed_dim = 64;
    add_layer("wide");
    facts.num_kv_heads = 1;
    add_layer("narrow");
  }
};

wire::LayerSpec windowed(std::uint32_t window, std::uint32_t kept_first = 0) {
  return {window, kept_first, false};
}

wire::LayerSpec cross() { return {std::nullopt, 0, true}; }

wire::OpenSessions opening() {
  wire::OpenSessions open;
  open.model = "llama";
  open.num_layers = 2;
  open.sessions = {{4096, 0, {}, 0}};
  return open;
}

const std::vector<std::byte> kHashes(300 * sessions::kPageHashBytes, std::byte{7});

ByteSpan hashes(std::size_t pages) { return {kHashes.data(), pages * sessions::kPageHashBytes}; }

template <class Message>
struct Refusal {
  std::string name;
  std::function<void(Message&)> change;  // of a message that would be taken
  Code code;
  std::string message;
};

template <class Message, class Check>
void check_refusals(const std::vector<Refusal<Message>>& refusals, const Message& good,
                    Check check) {
  CHECK(status_thrown([&] { check(good); }).message == "");
  for (const Refusal<Message>& refusal : refusals) {
    CAPTURE(refusal.name);
    Message message = good;
    refusal.change(message);
    const Status status = status_thrown([&] { check(message); });
    CHECK(name_of(status.code) == name_of(refusal.code));
    CHECK(status.message == refusal.message);
  }
}

using Open = wire::OpenSessions;

// A model for each layer.
std::function<void(Open&)> layers(std::vector<std::string_view> names) {
  return [names = std::move(names)](Open& open) {
    open.model = "";
    for (const std::string_view name : names) open.layer_models.push_back({name, ""});
  };
}

const std::vector<Refusal<Open>> kOpenRefusals{
    {"no model", [](Open& o) { o.model = ""; }, Code::kInvalidArgument,
     "model: given nothing; allowed: a name that ListModels gives"},
    {"unknown version", [](Open& o) { o.version = "3"; }, Code::kNotFound,
     "version: given '3'; versions of llama: 1"},
    {"transformer", [](Open& o) { o.model = "bert"; }, Code::kFailedPrecondition,
     "model: bert version 1 is a transformer; allowed: a core model, to which callers send query, "
     "key and value, or a layer model, to which they send hidden states"},
    {"layer model of before", [](Open& o) { o.model = "self"; }, Code::kFailedPrecondition,
     "model: self version 1 has no variant 'paged'; allowed: a model that has one: export it "
     "again"},
    {"layers and a model", [](Open& o) { o.layer_models = {{"block", ""}, {"block", ""}}; },
     Code::kInvalidArgument, "model: given 'llama'; allowed: nothing with layer_models"},
    {"layers and a version",
     [](Open& o) {
       o.model = "";
       o.version = "1";
       o.layer_models = {{"block", ""}, {"block", ""}};
     },
     Code::kInvalidArgument, "version: given '1'; allowed: nothing with layer_models"},
    {"layers' models and num_layers", layers({"block"}), Code::kInvalidArgument,
     "layer_models: given 1 of them; allowed: none, or num_layers, 2"},
    {"a layer without a model", layers({"block", ""}), Code::kInvalidArgument,
     "layer_models[1].model: given nothing; allowed: a name that ListModels gives"},
    {"a layer of no version",
     [](Open& o) {
       layers({"block", "block"})(o);
       o.layer_models[1].version = "3";
     },
     Code::kNotFound, "layer_models[1].version: given '3'; versions of block: 1"},
    {"a layer's model without the variant", layers({"block", "self"}), Code::kFailedPrecondition,
     "layer_models[1].model: self version 1 has no variant 'paged'; allowed: a model that has one: "
     "export it again"},
    {"a core as a layer's model", layers({"llama", "block"}), Code::kFailedPrecondition,
     "layer_models[0].model: llama is a core; allowed: a layer model"},
    {"layers of other heads", layers({"block", "narrow"}), Code::kInvalidArgument,
     "layer_models[1].model: given narrow of num_kv_heads 1; allowed: num_kv_heads 2, as the first "
     "layer's, block, has"},
    {"layers of other widths", layers({"block", "wide"}), Code::kInvalidArgument,
     "layer_models[1].model: given wide of embed_dim 64; allowed: embed_dim 32, as the first "
     "layer's, block, has"},
    {"layers of other dtypes", layers({"block", "half-block"}), Code::kInvalidArgument,
     "layer_models[1].model: given half-block of dtype FP16; allowed: dtype FP32, as the first "
     "layer's, block, has"},
    {"cross layer of a layer model",
     [](Open& o) {
       o.model = "block";
       o.layers = {cross()};
     },
     Code::kInvalidArgument,
     "layers[0].cross: given true; allowed: false, as block is a layer model"},
    {"latent layer of a layer model",
     [](Open& o) {
       layers({"block", "windowed-block"})(o);
       o.layers = {{}, {std::nullopt, 0, false, true}};
     },
     Code::kInvalidArgument,
     "layers[1].latent: given true; allowed: false, as windowed-block is a layer model"},
    {"cross layer of a model that turns heads",
     [](Open& o) {
       o.model = "turning";
       o.layers = {cross()};
     },
     Code::kInvalidArgument,
     "layers[0].cross: given true; allowed: false, as turning has rotary embedding"},
    {"without the variant", [](Open& o) { o.model = "causal"; }, Code::kFailedPrecondition,
     "model: causal version 1 has no variant 'paged'; allowed: a model that has one: export it "
     "again"},
    {"on CUDA", [](Open& o) { o.model = "gpu"; }, Code::kFailedPrecondition,
     "model: gpu version 1 runs on CUDA; allowed: models on the CPU, where sessions are kept"},
    {"no layers", [](Open& o) { o.num_layers = 0; }, Code::kInvalidArgument,
     "num_layers: given 0; allowed: 1..1024"},
    {"too many layers", [](Open& o) { o.num_layers = 1025; }, Code::kInvalidArgument,
     "num_layers: given 1025; allowed: 1..1024"},
    {"layers and num_layers", [](Open& o) { o.layers.resize(3); }, Code::kInvalidArgument,
     "layers: given 3 of them; allowed: none, 1 for all, or num_layers, 2"},
    {"window too large", [](Open& o) { o.layers = {windowed(1 << 25)}; }, Code::kInvalidArgument,
     "layers[0].window: given 33554432; allowed: 0..16777216"},
    {"kept without a window", [](Open& o) { o.layers = {windowed(8), windowed(0, 4)}; },
     Code::kInvalidArgument,
     "layers[1].kept_first: given 4; allowed: 0 without a window, as every key is kept"},
    {"kept too many", [](Open& o) { o.layers = {windowed(8, 1U << 31)}; }, Code::kInvalidArgument,
     "layers[0].kept_first: given 2147483648; allowed: 0..16777216"},
    {"cross with a window", [](Open& o) { o.layers = {{0, 0, true}}; }, Code::kInvalidArgument,
     "layers[0].window: given 0; allowed: nothing for a cross layer, whose queries see all keys"},
    {"cross with kept ones", [](Open& o) { o.layers = {{std::nullopt, 3, true}}; },
     Code::kInvalidArgument,
     "layers[0].kept_first: given 3; allowed: nothing for a cross layer, whose queries see all "
     "keys"},
    {"not causal", [](Open& o) { o.model = "encoder"; }, Code::kFailedPrecondition,
     "layers[0].cross: given false; model encoder is not causal; allowed: true, or a causal model"},
    {"some latent layers", [](Open& o) { o.layers = {{{}, 0, false, true}, {}}; },
     Code::kInvalidArgument,
     "layers[1].latent: given false; allowed: true, as of layers[0]: all pages have one size"},
    {"some layers not latent", [](Open& o) { o.layers = {{}, {{}, 0, false, true}}; },
     Code::kInvalidArgument,
     "layers[1].latent: given true; allowed: false, as of layers[0]: all pages have one size"},
    {"latent layers of long values",
     [](Open& o) {
       o.model = "long";
       o.layers = {{{}, 0, false, true}};
     },
     Code::kFailedPrecondition,
     "model: long version 1 has value_head_dim 9 and head_dim 8; allowed for latent layers: "
     "value_head_dim of at most head_dim"},
    {"latent layers of an older graph",
     [](Open& o) {
       o.model = "old";
       o.layers = {{{}, 0, false, true}};
     },
     Code::kFailedPrecondition,
     "model: old version 1 has a variant 'paged' without latent layers; allowed: export it again"},
    {"cache type", [](Open& o) { o.cache_type = 6; }, Code::kInvalidArgument,
     "cache_type: given 6; allowed: CACHE_AS_MODEL, CACHE_FP32, CACHE_FP16, CACHE_BF16, "
     "CACHE_INT8, CACHE_FP8"},
    {"no cache type", [](Open& o) { o.cache_type = -1; }, Code::kInvalidArgument,
     "cache_type: given -1; allowed: CACHE_AS_MODEL, CACHE_FP32, CACHE_FP16, CACHE_BF16, "
     "CACHE_INT8, CACHE_FP8"},
    {"no sessions", [](Open& o) { o.sessions.clear(); }, Code::kInvalidArgument,
     "sessions: given 0 of them; allowed: 1..64"},
    {"too many sessions", [](Open& o) { o.sessions.resize(65); }, Code::kInvalidArgument,
     "sessions: given 65 of them; allowed: 1..64"},
    {"no tokens", [](Open& o) { o.sessions[0].max_tokens = 0; }, Code::kInvalidArgument,
     "sessions[0].max_tokens: given 0; allowed: 1..16777216"},
    {"too many tokens", [](Open& o) { o.sessions[0].max_tokens = UINT64_MAX; },
     Code::kInvalidArgument,
     "sessions[0].max_tokens: given 18446744073709551615; allowed: 1..16777216"},
    {"too many reserved", [](Open& o) { o.sessions[0].reserved_tokens = 4097; },
     Code::kInvalidArgument,
     "sessions[0].reserved_tokens: given 4097; allowed: 0..4096, max_tokens"},
    {"part of a hash", [](Open& o) { o.sessions[0].prefix_hashes = hashes(1).first(31); },
     Code::kInvalidArgument,
     "sessions[0].prefix_hashes: given 31 bytes; allowed: 32 bytes for each page"},
    {"too many hashes", [](Open& o) { o.sessions[0].prefix_hashes = hashes(257); },
     Code::kInvalidArgument,
     "sessions[0].prefix_hashes: given 257 pages; allowed: 0..256, as max_tokens has full pages of "
     "16"},
    {"cross tokens without a layer", [](Open& o) { o.sessions[0].cross_tokens = 1; },
     Code::kInvalidArgument, "sessions[0].cross_tokens: given 1; allowed: 0 without a cross layer"},
    {"a layer without cross tokens", [](Open& o) { o.layers = {windowed(0), cross()}; },
     Code::kInvalidArgument, "sessions[0].cross_tokens: given 0; allowed: 1..16777216"},
    {"hashes with cross layers",
     [](Open& o) {
       o.layers = {windowed(0), cross()};
       o.sessions[0] = {4096, 0, hashes(1), 20};
     },
     Code::kInvalidArgument,
     "sessions[0].prefix_hashes: given 1 pages; allowed: none with a cross layer"},
};

TEST_CASE("a bad opening of sessions is refused") {
  Paged world;
  check_refusals(kOpenRefusals, opening(),
                 [&](const Open& open) { plan_open(open, world.context(), kPageTokens); });
}

TEST_CASE("layers are each as said, as one says for all, or as the model") {
  Paged world;
  const auto layers = [&](std::string_view model, std::vector<wire::LayerSpec> specs) {
    wire::OpenSessions open = opening();
    open.model = model;
    open.num_layers = 3;
    open.layers = std::move(specs);
    return plan_open(open, world.context(), kPageTokens).spec.layers;
  };
  using Layers = std::vector<sessions::LayerSpec>;
  // Of the keys that callers count, the store does not count the query's own.
  CHECK(layers("llama", {}) == Layers(3, {-1, 0, false}));
  CHECK(layers("windowed", {}) == Layers(3, {99, 0, false}));
  CHECK(layers("windowed", {windowed(0)}) == Layers(3, {-1, 0, false}));
  CHECK(layers("llama", {windowed(1)}) == Layers(3, {0, 0, false}));
  CHECK(layers("llama", {windowed(32, 4)}) == Layers(3, {31, 4, false}));
  CHECK(layers("windowed", {windowed(32, 4), {}, {std::nullopt, 2, false}}) ==
        Layers{{31, 4, false}, {99, 0, false}, {99, 2, false}});
  wire::LayerSpec sunk;
  sunk.sinks = {1, 2, -std::numeric_limits<float>::infinity(), 4};
  CHECK(layers("llama", {sunk, {}, {}}) ==
        Layers{{-1, 0, false, sunk.sinks}, {-1, 0, false}, {-1, 0, false}});
  const auto refused = [&](std::string_view model) {
    return status_thrown([&] { layers(model, {sunk}); });
  };
  CHECK(refused("block").message ==
        "layers[0].sinks: given 4 of them; allowed: none, as block is a layer model");
  CHECK(refused("old").code == Code::kFailedPrecondition);
  sunk.sinks[2] = std::numeric_limits<float>::quiet_NaN();
  CHECK(refused("llama").message ==
        "layers[0].sinks[2]: given nan; allowed: finite numbers and -infinity");
  sunk.sinks.pop_back();
  CHECK(refused("llama").message ==
        "layers[0].sinks: given 3 of them; allowed: none, or 4, num_heads of the model");
}

TEST_CASE("sessions are planned as they were asked for") {
  Paged world;
  wire::OpenSessions open = opening();
  open.sessions = {{64, 0, hashes(2), 0}, {1 << 24, 5, {}, 0}};
  const OpenPlan plan = plan_open(open, world.context(), kPageTokens);
  CHECK(plan.models.size() == 1);
  CHECK(plan.models.of(1).facts().name == "llama");
  CHECK(plan.models.of(1).paged->name() == "paged");
  CHECK(plan.spec.model == "llama");
  CHECK(plan.spec.version == "1");
  CHECK(plan.spec.layout == sessions::PageLayout{2, 8, 6, sessions::CacheType::kFp32, 16});
  CHECK(!plan.spec.layout.latent);
  REQUIRE(plan.opened.size() == 2);
  CHECK(plan.opened[0].max_tokens == 64);
  CHECK(plan.opened[0].reserved_tokens == 0);
  CHECK(plan.opened[0].prefix_hashes.size() == 2);
  CHECK(plan.opened[0].prefix_hashes[1][31] == 7);
  CHECK(plan.opened[1].max_tokens == 1 << 24);
  CHECK(plan.opened[1].reserved_tokens == 5);

  open.model = "encoder";
  open.layers = {cross()};
  open.sessions = {{64, 0, {}, 20}};
  CHECK(plan_open(open, world.context(), kPageTokens).opened[0].cross_tokens == 20);
}

TEST_CASE("the model of a session is found again, if it is still the same") {
  Paged world;
  const sessions::SessionSpec spec = plan_open(opening(), world.context(), kPageTokens).spec;
  const auto found = [&](const sessions::SessionSpec& sought) {
    return kv_models(sought, world.context());
  };
  CHECK(found(spec).facts().name == "llama");
  CHECK(found(spec).of(0).paged->name() == "paged");
  sessions::SessionSpec other = spec;
  other.model = "nope";
  CHECK(status_thrown([&] { found(other); }).code == Code::kNotFound);
  other = spec;
  other.layout.head_dim = 16;
  const Status status = status_thrown([&] { found(other); });
  CHECK(status.code == Code::kFailedPrecondition);
  CHECK(status.message ==
        "model: llama version 1 has other heads or another mask than the session: num_kv_heads 2, "
        "head_dim 16, value_head_dim 6; allowed: the model that it was opened with");
  other = spec;
  other.model = "encoder";
  other.layout = {4, 8, 8, sessions::CacheType::kFp16, kPageTokens};
  CHECK(status_thrown([&] { found(other); }).code == Code::kFailedPrecondition);
  for (sessions::LayerSpec& layer : other.layers) layer.cross = true;
  CHECK(status_thrown([&] { found(other); }).ok());
}

TEST_CASE("each layer is computed by its own model, or all by one") {
  Paged world;
  const auto planned = [&](std::vector<std::string_view> names) {
    Open open = opening();
    open.num_layers = static_cast<std::uint32_t>(names.size());
    layers(std::move(names))(open);
    return plan_open(open, world.context(), kPageTokens);
  };
  const OpenPlan plan = planned({"block", "windowed-block", "other-block"});
  CHECK(plan.models.of(1).facts().name == "windowed-block");
  CHECK(plan.models.of(2).facts().name == "other-block");
  CHECK(plan.spec.model == "");
  using Names = std::vector<sessions::ModelName>;
  const Names names{{"block", "1"}, {"windowed-block", "1"}, {"other-block", "1"}};
  CHECK(plan.spec.layer_models == names);
  // Each has its own model's window.
  using Layers = std::vector<sessions::LayerSpec>;
  CHECK(plan.spec.layers == Layers{{-1, 0, false}, {99, 0, false}, {-1, 0, false}});
  CHECK(plan.spec.layout == sessions::PageLayout{2, 8, 8, sessions::CacheType::kFp32, 16});
  CHECK(kv_models(plan.spec, world.context()).of(1).facts().name == "windowed-block");
  // Those who say one model for all and those who say it of each can be in one step.
  const OpenPlan one = planned({"block", "block"});
  CHECK(one.models.size() == 1);
  Open open = opening();
  open.model = "block";
  CHECK(one.spec == plan_open(open, world.context(), kPageTokens).spec);

  // What nobody opens but an export might say.
  sessions::SessionSpec forged = plan.spec;
  forged.layer_models[1].model = "wide";
  CHECK(status_thrown([&] { kv_models(forged, world.context()); }).code == Code::kInvalidArgument);
  forged.layer_models[1].model = "llama";
  CHECK(status_thrown([&] { kv_models(forged, world.context()); }).code ==
        Code::kFailedPrecondition);
  forged = plan.spec;
  forged.layers[2] = {-1, 0, true};
  CHECK(status_thrown([&] { kv_models(forged, world.context()); }).code ==
        Code::kFailedPrecondition);
}

TEST_CASE("a cache is of the type asked for, or of the model's") {
  Paged world;
  const auto type = [&](std::string_view model, std::int32_t number) {
    wire::OpenSessions open = opening();
    open.model = model;
    if (model == "encoder") {
      open.layers = {cross()};
      open.sessions[0].cross_tokens = 1;
    }
    open.cache_type = number;
    return plan_open(open, world.context(), kPageTokens).spec.layout.type;
  };
  using sessions::CacheType;
  CHECK(type("llama", 0) == CacheType::kFp32);
  CHECK(type("encoder", 0) == CacheType::kFp16);
  CHECK(type("windowed", 0) == CacheType::kBf16);
  CHECK(type("windowed", 1) == CacheType::kFp32);
  CHECK(type("llama", 2) == CacheType::kFp16);
  CHECK(type("llama", 3) == CacheType::kBf16);
  CHECK(type("llama", 4) == CacheType::kInt8);
  CHECK(type("llama", 5) == CacheType::kFp8);
}

using Step = wire::BeginStep;

Step stepping() {
  Step step;
  step.step_id = 5;
  step.sessions = {{"one", 4, {}, {}, 0}, {"two", 3, {-1, 0, 0}, {}, 0}};
  return step;
}

const std::vector<Refusal<Step>> kStepRefusals{
    {"no id", [](Step& s) { s.step_id = 0; }, Code::kInvalidArgument,
     "step_id: given 0; allowed: 1 or more"},
    {"priority", [](Step& s) { s.priority = 4; }, Code::kInvalidArgument,
     "priority: given 4; allowed: 1 (high), 2 (normal), 3 (low), 0 (normal)"},
    {"no sessions", [](Step& s) { s.sessions.clear(); }, Code::kInvalidArgument,
     "sessions: given 0 of them; allowed: 1..64"},
    {"too many sessions", [](Step& s) { s.sessions.resize(65); }, Code::kInvalidArgument,
     "sessions: given 65 of them; allowed: 1..64"},
    {"no new tokens", [](Step& s) { s.sessions[0].new_tokens = 0; }, Code::kInvalidArgument,
     "sessions[0].new_tokens: given 0; allowed: 1..4096"},
    {"too many new tokens", [](Step& s) { s.sessions[0].new_tokens = 4097; },
     Code::kInvalidArgument, "sessions[0].new_tokens: given 4097; allowed: 1..4096"},
    {"too many together", [](Step& s) { s.sessions[0].new_tokens = 4094; }, Code::kInvalidArgument,
     "new_tokens T of all sessions: given 4097; allowed: 0..4096"},
    {"too many cross tokens", [](Step& s) { s.sessions[0].cross_tokens = 4097; },
     Code::kInvalidArgument, "sessions[0].cross_tokens: given 4097; allowed: 0..4096"},
    {"too many cross tokens together",
     [](Step& s) { s.sessions[0].cross_tokens = s.sessions[1].cross_tokens = 4000; },
     Code::kInvalidArgument, "cross_tokens C of all sessions: given 8000; allowed: 0..4096"},
    {"too few parents", [](Step& s) { s.sessions[1].parents.pop_back(); }, Code::kInvalidArgument,
     "sessions[1].parents: given 2 of them; allowed: none, or one for each of new_tokens, 3"},
    {"the first token's parent", [](Step& s) { s.sessions[1].parents[0] = 0; },
     Code::kInvalidArgument,
     "sessions[1].parents[0]: given 0; allowed: -1, the last token before the step"},
    {"a token its own parent", [](Step& s) { s.sessions[1].parents[2] = 2; },
     Code::kInvalidArgument, "sessions[1].parents[2]: given 2; allowed: -1..1, a token before it"},
    {"no such parent", [](Step& s) { s.sessions[1].parents[2] = -2; }, Code::kInvalidArgument,
     "sessions[1].parents[2]: given -2; allowed: -1..1, a token before it"},
    {"a tree with hashes", [](Step& s) { s.sessions[1].prefix_hashes = hashes(1); },
     Code::kInvalidArgument,
     "sessions[1].prefix_hashes: given 32 bytes; allowed: nothing with parents: which tokens are "
     "kept is not known yet"},
    {"part of a hash", [](Step& s) { s.sessions[0].prefix_hashes = hashes(2).first(33); },
     Code::kInvalidArgument,
     "sessions[0].prefix_hashes: given 33 bytes; allowed: 32 bytes for each page"},
};

TEST_CASE("a bad step is refused") {
  const Limits limits = small_limits();
  check_refusals(kStepRefusals, stepping(), [&](const Step& step) { plan_step(step, limits); });
}

TEST_CASE("a step has the tokens of its sessions") {
  Step message = stepping();
  message.sessions[0].prefix_hashes = hashes(1);
  message.sessions[0].cross_tokens = 9;
  const StepPlan plan = plan_step(message, small_limits());
  CHECK(plan.step_id == 5);
  CHECK(plan.priority == kNormal);
  CHECK(plan.tokens == 7);
  CHECK(plan.cross_tokens == 9);
  REQUIRE(plan.sessions.size() == 2);
  CHECK(plan.sessions[0].id == "one");
  CHECK(plan.sessions[0].new_tokens == 4);
  CHECK(plan.sessions[0].prefix_hashes.size() == 1);
  CHECK(plan.sessions[0].parents.empty());
  CHECK(std::ranges::equal(plan.sessions[1].parents, std::vector<std::int32_t>{-1, 0, 0}));
}

using Attend = wire::AttendLayer;

TEST_CASE("a step that a layer begins has the layer's id") {
  Attend message;
  message.step_id = 5;
  message.begin = stepping();
  for (const std::uint64_t id : {0, 5}) {
    message.begin->step_id = id;
    const StepPlan plan = plan_begun_step(message, small_limits());
    CHECK(plan.step_id == 5);
    CHECK(plan.tokens == 7);
  }
  const auto refusal = [&] {
    return status_thrown([&] { plan_begun_step(message, small_limits()); }).message;
  };
  message.begin->step_id = 6;
  CHECK(refusal() == "begin.step_id: given 6; allowed: 5, the layer's step_id, or 0");
  message.begin->step_id = message.step_id = 0;
  CHECK(refusal() == "step_id: given 0; allowed: 1 or more");
  message.step_id = 5;
  message.begin->sessions[0].new_tokens = 0;
  CHECK(refusal() == "sessions[0].new_tokens: given 0; allowed: 1..4096");
}

// A step of 5 tokens in three layers, the last one cross, whose 9 keys come with it.
class Layers {
 public:
  explicit Layers(std::int64_t cross_tokens = 9) : cross_tokens_(cross_tokens) {
    facts_.num_kv_heads = 2;
    facts_.value_head_dim = 6;
  }

  StepShape step() const {
    return {facts_,  layers_, 5,           cross_tokens_, latent_,
            starts_, keys_,   cross_keys_, gives_weights_};
  }
  LayerPart check(const Attend& message) const { return check_layer(message, step(), limits_); }

  wire::TensorMessage tensor(const std::vector<std::int64_t>& shape,
                             DataType dtype = DataType::kFp32) {
    return request_.tensor(shape, dtype);
  }
  Attend attend(std::uint32_t layer = 0) {
    Attend message;
    message.layer = layer;
    message.query = tensor({5, 4, 8});
    const std::int64_t keys = layer == 2 ? 9 : 5;
    message.key = tensor({keys, 2, 8});
    message.value = tensor({keys, 2, 6});
    return message;
  }

  Limits limits_ = small_limits();
  bool latent_ = false, gives_weights_ = true;

 private:
  Request request_;
  engine::ModelFacts facts_ = core_facts("llama");
  std::vector<sessions::LayerSpec> layers_{{}, {31, 4, false}, {-1, 0, true}};
  std::int64_t cross_tokens_;
  std::vector<std::int64_t> starts_{0, 2, 5}, keys_{12, 3}, cross_keys_{4, 5};
};

TEST_CASE("a bad layer of a step is refused") {
  Layers layers;
  const auto invalid = Code::kInvalidArgument;
  const std::vector<Refusal<Attend>> refusals{
      {"no such layer", [](Attend& a) { a.layer = 3; }, invalid, "layer: given 3; allowed: 0..2"},
      {"no tensors", [](Attend& a) { a = {}; }, invalid,
       "query: given nothing; allowed: query, key and value, or one part of them"},
      {"no value", [](Attend& a) { a.value.reset(); }, invalid,
       "value: given nothing; allowed: both key and value, or neither"},
      {"no key", [](Attend& a) { a.key.reset(); }, invalid,
       "key: given nothing; allowed: both key and value, or neither"},
      {"query tokens", [&](Attend& a) { a.query = layers.tensor({4, 4, 8}); }, invalid,
       "query.shape: given [4, 4, 8]; allowed: 5 at axis 0 (T, the new_tokens of all sessions of "
       "the step)"},
      {"query heads", [&](Attend& a) { a.query = layers.tensor({5, 2, 8}); }, invalid,
       "query.shape: given [5, 2, 8]; allowed: 4 at axis 1 (num_heads of the model)"},
      {"query head_dim", [&](Attend& a) { a.query = layers.tensor({5, 4, 6}); }, invalid,
       "query.shape: given [5, 4, 6]; allowed: 8 at axis 2 (head_dim of the model)"},
      {"query rank", [&](Attend& a) { a.query = layers.tensor({1, 5, 4, 8}); }, invalid,
       "query.shape: given [1, 5, 4, 8] of rank 4; allowed: rank 3, [T, H, D]"},
      {"query dtype", [&](Attend& a) { a.query = layers.tensor({5, 4, 8}, DataType::kFp16); },
       invalid, "query.dtype: given FP16; allowed: FP32"},
      {"key tokens", [&](Attend& a) { a.key = layers.tensor({9, 2, 8}); }, invalid,
       "key.shape: given [9, 2, 8]; allowed: 5 at axis 0 (T, the new_tokens of all sessions of the "
       "step)"},
      {"key heads", [&](Attend& a) { a.key = layers.tensor({5, 4, 8}); }, invalid,
       "key.shape: given [5, 4, 8]; allowed: 2 at axis 1 (num_kv_heads of the model)"},
      {"value head_dim", [&](Attend& a) { a.value = layers.tensor({5, 2, 8}); }, invalid,
       "value.shape: given [5, 2, 8]; allowed: 6 at axis 2 (value_head_dim of the model)"},
      {"value rank", [&](Attend& a) { a.value = layers.tensor({5, 12}); }, invalid,
       "value.shape: given [5, 12] of rank 2; allowed: rank 3, [T, Hkv, Dv]"},
      {"cross keys", [](Attend& a) { a.layer = 2; }, invalid,
       "key.shape: given [5, 2, 8]; allowed: 9 at axis 0 (C, the cross_tokens of all sessions of "
       "the step)"},
      {"chunks", [](Attend& a) { a.query->content = wire::TensorMessage::Content::kChunked; },
       invalid, "query.chunked: given set; allowed: data; chunks go over AttendStream"},
      {"weights of no such session", [](Attend& a) { a.returns.weights_of = {0, 2}; }, invalid,
       "returns.weights_of[1]: given 2; allowed: 0..1, the sessions of the step"},
      {"weights of a session twice", [](Attend& a) { a.returns.weights_of = {1, 1}; }, invalid,
       "returns.weights_of[1]: given 1; allowed: more than 1, before it"},
      {"hidden states", [&](Attend& a) { a.hidden_states = layers.tensor({5, 8}); }, invalid,
       "hidden_states: given a tensor; allowed: nothing for a core model: query, key and value"},
      {"nothing to return", [](Attend& a) { a.returns.no_output = true; }, invalid,
       "returns: given nothing to return; allowed: at least one thing"},
      {"a region too small",
       [](Attend& a) {
         a.returns = {false, true, true, {}};  // 480 bytes, and 80 at 512 and at 640
         a.output_region = wire::RegionMessage{"region", 0, 719};
       },
       invalid, "output_region.byte_size: given 719; allowed: 720 or more, for this answer"},
      {"a region unaligned",
       [](Attend& a) { a.output_region = wire::RegionMessage{"region", 8, 1024}; }, invalid,
       "output_region.offset: given 8; allowed: a multiple of 64"},
  };
  check_refusals(refusals, layers.attend(), [&](const Attend& message) { layers.check(message); });
}

TEST_CASE("a layer model takes hidden states alone") {
  engine::ModelFacts facts = core_facts("block");
  facts.kind = engine::Kind::kLayer;
  facts.embed_dim = 32;
  const std::vector<sessions::LayerSpec> specs(2);
  const std::vector<std::int64_t> starts{0, 2, 5}, keys{2, 9};
  const StepShape step{facts, specs, 5, 0, false, starts, keys, {}};
  Request request;
  Attend good;
  good.layer = 1;
  good.hidden_states = request.tensor({5, 32}, DataType::kFp32);
  good.returns = {false, true, false, {}};
  const auto check = [&](const Attend& message) {
    return check_layer(message, step, small_limits());
  };
  const LayerPart part = check(good);
  CHECK(part.has_query());
  CHECK(!part.query);
  CHECK(part.hidden_states->byte_size == 5 * 32 * 4);
  REQUIRE(part.results.size() == 2);
  CHECK(part.results[0].shape == Shape{5, 32});
  CHECK(part.results[1].shape == Shape{5, 4});
  CHECK(!takes_key(step, specs[1]));
  Attend weighty = good;
  weighty.returns = {true, false, false, {1}};
  CHECK(check(weighty).results[0].shape == Shape{3, 4, 9});

  const auto invalid = Code::kInvalidArgument;
  const auto tensor = [&] { return request.tensor({5, 4, 8}, DataType::kFp32); };
  const std::vector<Refusal<Attend>> refusals{
      {"nothing", [](Attend& a) { a.hidden_states.reset(); }, invalid,
       "hidden_states: given nothing; allowed: [T, E]"},
      {"a query", [&](Attend& a) { a.query = tensor(); }, invalid,
       "query: given a tensor; allowed: nothing for a layer model: hidden_states"},
      {"a key", [&](Attend& a) { a.key = tensor(); }, invalid,
       "key: given a tensor; allowed: nothing for a layer model: hidden_states"},
      {"a value", [&](Attend& a) { a.value = tensor(); }, invalid,
       "value: given a tensor; allowed: nothing for a layer model: hidden_states"},
      {"tokens", [&](Attend& a) { a.hidden_states = request.tensor({4, 32}, DataType::kFp32); },
       invalid,
       "hidden_states.shape: given [4, 32]; allowed: 5 at axis 0 (T, the new_tokens of all "
       "sessions of the step)"},
      {"width", [&](Attend& a) { a.hidden_states = request.tensor({5, 31}, DataType::kFp32); },
       invalid,
       "hidden_states.shape: given [5, 31]; allowed: 32 at axis 1 (embed_dim of the model)"},
      {"rank", [&](Attend& a) { a.hidden_states = tensor(); }, invalid,
       "hidden_states.shape: given [5, 4, 8] of rank 3; allowed: rank 2, [T, E]"},
      {"dtype", [&](Attend& a) { a.hidden_states = request.tensor({5, 32}, DataType::kFp16); },
       invalid, "hidden_states.dtype: given FP16; allowed: FP32"},
  };
  check_refusals(refusals, good, check);
}

TEST_CASE("a cross layer takes no key once its keys are there") {
  Layers layers(0);
  Attend message = layers.attend(2);
  const auto status = [&] { return status_thrown([&] { layers.check(message); }); };
  CHECK(status().message ==
        "key: given a tensor; allowed: nothing for layer 2, as the step has queries_only, or the "
        "layer is cross and cross_tokens is 0");
  message.key.reset();
  CHECK(status().message ==
        "value: given a tensor; allowed: nothing for layer 2, as the step has queries_only, or the "
        "layer is cross and cross_tokens is 0");
  message.value.reset();
  CHECK(status().message == "");
  message.query.reset();
  CHECK(status().message == "query: given nothing; allowed: [T, H, D]");
  CHECK(!takes_key(layers.step(), layers.step().layers[2]));
  CHECK(takes_key(layers.step(), layers.step().layers[0]));
}

TEST_CASE("a layer's query and its key and value may come apart") {
  Layers layers;
  Attend query = layers.attend(2), key = layers.attend(2);
  query.key.reset();
  query.value.reset();
  key.query.reset();
  key.returns.no_output = true;  // counts with the query only
  const LayerPart first = layers.check(query), second = layers.check(key);
  CHECK(first.has_query());
  CHECK(!first.has_key());
  CHECK(first.layer == 2);
  CHECK(!second.has_query());
  CHECK(second.key->shape == Shape{9, 2, 8});
  CHECK(second.value->byte_size == 9 * 2 * 6 * 4);
  CHECK(second.results.empty());
}

TEST_CASE("a layer answers what was asked for") {
  Layers layers;
  Attend message = layers.attend();
  message.returns = {false, true, true, {}};
  message.output_region = wire::RegionMessage{"region", 64, 720};
  LayerPart part = layers.check(message);
  REQUIRE(part.results.size() == 3);
  CHECK(part.results[0].output == wire::LayerOutput::kOutput);
  CHECK(part.results[0].shape == Shape{5, 4, 6});
  CHECK(part.results[0].byte_size == 480);
  CHECK(part.results[1].output == wire::LayerOutput::kLogSumExp);
  CHECK(part.results[1].shape == Shape{5, 4});
  CHECK(part.results[2].byte_size == 80);
  CHECK(part.response_bytes == 640);
  CHECK(part.output_region->name == "region");
  message.returns = {true, true, false, {}};
  part = layers.check(message);
  REQUIRE(part.results.size() == 1);
  CHECK(part.results[0].output == wire::LayerOutput::kLogSumExp);
}

TEST_CASE("weights are of the sessions that are named, for all keys that these have") {
  Layers layers;
  Attend message = layers.attend();
  message.returns = {true, false, true, {1}};
  LayerPart part = layers.check(message);
  REQUIRE(part.results.size() == 2);
  CHECK(part.results[1].output == wire::LayerOutput::kWeights);
  CHECK(part.results[1].shape == Shape{3, 4, 3});
  CHECK(part.weights_of == std::vector<std::int64_t>{1});
  CHECK(part.response_bytes == 80 + 3 * 4 * 3 * 4);
  message = layers.attend(2);
  message.returns.weights_of = {0, 1};
  part = layers.check(message);
  REQUIRE(part.results.size() == 3);
  CHECK(part.results[1].shape == Shape{2, 4, 4});
  CHECK(part.results[2].shape == Shape{3, 4, 5});
  CHECK(part.results[2].byte_size == 240);
  layers.limits_.max_response_bytes = part.response_bytes - 1;
  CHECK(status_thrown([&] { layers.check(message); }).code == Code::kResourceExhausted);
  layers.gives_weights_ = false;
  const Status status = status_thrown([&] { layers.check(message); });
  CHECK(status.code == Code::kFailedPrecondition);
  CHECK(status.message ==
        "returns.weights_of: given 2 of them; allowed: none, as the variant 'paged' of llama gives "
        "no weights: export it again");
}

TEST_CASE("a latent layer has no value") {
  Layers layers;
  layers.latent_ = true;
  Attend message = layers.attend(1);
  const auto status = [&] { return status_thrown([&] { layers.check(message); }); };
  CHECK(status().message ==
        "value: given a tensor; allowed: nothing for layer 1, a latent layer, whose keys hold it");
  message.value.reset();
  LayerPart part = layers.check(message);
  CHECK(part.has_key());
  CHECK(!part.value);
  CHECK(part.results[0].shape == Shape{5, 4, 6});
  message.query.reset();
  CHECK(layers.check(message).has_key());
  message.key.reset();
  CHECK(status().message == "query: given nothing; allowed: query and key, or one of them");
}

TEST_CASE("sessions of latent layers are planned as such") {
  Paged world;
  wire::OpenSessions open = opening();
  open.layers = {{100, 2, false, true}};
  const OpenPlan plan = plan_open(open, world.context(), kPageTokens);
  CHECK(plan.spec.layout == sessions::PageLayout{2, 8, 6, sessions::CacheType::kFp32, 16, true});
  CHECK(plan.spec.layers == std::vector<sessions::LayerSpec>(2, {99, 2, false}));
  CHECK(kv_models(plan.spec, world.context()).of(0).model == plan.models.of(0).model);
}

TEST_CASE("a layer of too many bytes is refused") {
  Layers layers;
  layers.limits_.max_request_bytes = 1000;
  const Status request = status_thrown([&] { layers.check(layers.attend()); });
  CHECK(request.code == Code::kResourceExhausted);
  CHECK(request.message ==
        "request size: its tensors take 1200 bytes; allowed: 1000 (--max-request-mib)");
  layers.limits_ = small_limits();
  layers.limits_.max_response_bytes = 100;
  const Status response = status_thrown([&] { layers.check(layers.attend()); });
  CHECK(response.message ==
        "response size: its tensors take 480 bytes; allowed: 100 (--max-response-mib)");
}

TEST_CASE("the elements of a tensor are where its message has them, or in shared memory") {
  World world;
  Layers layers;
  const Attend message = layers.attend();
  const LayerPart part = layers.check(message);
  std::vector<sessions::RegionView> views;
  CHECK(elements_of(*part.query, message.query->data, world.regions, kPeer, views).data() ==
        message.query->data.data());
  CHECK(views.empty());
  TensorSpec shared = *part.query;
  shared.region = Region{"nowhere", 0, shared.byte_size};
  const Status status =
      status_thrown([&] { elements_of(shared, {}, world.regions, kPeer, views); });
  CHECK(status.code == Code::kNotFound);
}

TEST_CASE("a chunk of an import has data") {
  CHECK(status_thrown([] { check_import({}); }).message ==
        "chunk.data: given nothing; allowed: at least one byte");
  wire::ImportSession import;
  import.chunk.data = hashes(1);
  CHECK(status_thrown([&] { check_import(import); }).ok());
}

}  // namespace
}  // namespace attnserve::requests
