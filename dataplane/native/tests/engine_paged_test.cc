#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <numeric>
#include <random>

#include "base/status.h"
#include "engine/paged.h"
#include "fake_session.h"
#include "onnx_model.h"

using namespace attnserve;
using namespace attnserve::engine;

namespace {

constexpr std::int64_t kHeads = 4, kKvHeads = 2, kDim = 16, kValueDim = 8, kPageTokens = 4;
constexpr float kScale = 0.25F;
constexpr std::size_t kPageBytes = kKvHeads * kPageTokens * (kDim + kValueDim) * sizeof(float);
constexpr std::size_t kPages = 256;
constexpr int kOnnxUint8 = 2;
static_assert(kPageBytes % 64 == 0);

// As the exporter writes it; earlier ones wrote a spec of five or six numbers.
std::unique_ptr<Session> paged_graph(const std::shared_ptr<Runtime>& runtime,
                                     std::int64_t spec_numbers = 7) {
  const std::vector<std::string> inputs{"query",   "key",          "value", "cache", "starts",
                                        "lengths", "table_starts", "table", "spec",  "parents",
                                        "",        "weights_of"};
  const std::vector<std::string> outputs{"output", "log_sum_exp", "entropy", "weights"};
  Graph graph{{{"PagedAttention",
                "attnserve",
                inputs,
                outputs,
                {{"scale", true, kScale, 0},
                 {"softcap", true, 0, 0},
                 {"num_kv_heads", false, 0, kKvHeads},
                 {"head_dim", false, 0, kDim},
                 {"value_head_dim", false, 0, kValueDim}}}},
              {{"query", kOnnxFloat, {-1, kHeads, kDim}},
               {"key", kOnnxFloat, {-1, kKvHeads, kDim}},
               {"value", kOnnxFloat, {-1, kKvHeads, kValueDim}},
               {"cache", kOnnxUint8, {-1}}},
              {{"output", kOnnxFloat, {-1, kHeads, kValueDim}},
               {"log_sum_exp", kOnnxFloat, {-1, kHeads}},
               {"entropy", kOnnxFloat, {-1, kHeads}},
               {"weights", kOnnxFloat, {-1}}}};
  for (std::size_t at = 4; at < inputs.size(); ++at) {
    const std::int64_t size = inputs[at] == "spec" ? spec_numbers : -1;
    if (!inputs[at].empty()) graph.inputs.push_back({inputs[at], kOnnxInt64, {size}});
  }
  return load_graph(runtime, graph);
}

std::vector<float> normal(std::mt19937& random, std::int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<std::size_t>(count));
  std::ranges::generate(values, [&] { return distribution(random); });
  return values;
}

Tensor tensor_of(std::vector<float>& values, const Shape& shape) {
  return {DataType::kFp32, shape, reinterpret_cast<std::byte*>(values.data())};
}

struct Cache {
  Bytes bytes = Bytes::allocate(kPages * kPageBytes);
  std::size_t taken = 0;
};

// A sequence and all keys and values that it ever had.
struct Sequence {
  std::vector<std::int64_t> pages;
  std::vector<float> keys, values;
  std::int64_t length() const { return static_cast<std::int64_t>(keys.size()) / (kKvHeads * kDim); }
};

// New tokens of some sequences, with all memory that their work views.
struct Step {
  Step(const Variant& variant, Cache& cache, std::vector<Sequence*> of,
       const std::vector<std::int64_t>& counts, std::mt19937& random, PagedSpec spec = {})
      : sequences(std::move(of)) {
    for (const std::int64_t count : counts) starts.push_back(starts.back() + count);
    const std::int64_t tokens = starts.back();
    query = normal(random, tokens * kHeads * kDim);
    key = normal(random, tokens * kKvHeads * kDim);
    value = normal(random, tokens * kKvHeads * kValueDim);
    output.resize(static_cast<std::size_t>(tokens * kHeads * kValueDim));
    log_sum_exp.resize(static_cast<std::size_t>(tokens * kHeads));
    work.variant = &variant;
    spec.page_tokens = kPageTokens;
    work.spec = spec;
    work.cache = cache.bytes.span();
    work.query = tensor_of(query, {tokens, kHeads, kDim});
    work.key = tensor_of(key, {tokens, kKvHeads, kDim});
    work.value = tensor_of(value, {tokens, kKvHeads, kValueDim});
    work.output = tensor_of(output, {tokens, kHeads, kValueDim});
    work.log_sum_exp = tensor_of(log_sum_exp, {tokens, kHeads});
    work.starts = work.key_starts = starts;
    for (std::size_t at = 0; at < sequences.size(); ++at) {
      Sequence& sequence = *sequences[at];
      const auto begin = starts[at], end = starts[at + 1];
      sequence.keys.insert(sequence.keys.end(), key.begin() + begin * kKvHeads * kDim,
                           key.begin() + end * kKvHeads * kDim);
      sequence.values.insert(sequence.values.end(), value.begin() + begin * kKvHeads * kValueDim,
                             value.begin() + end * kKvHeads * kValueDim);
      while (static_cast<std::int64_t>(sequence.pages.size()) * kPageTokens < sequence.length()) {
        sequence.pages.push_back(static_cast<std::int64_t>(cache.taken++ * kPageBytes));
      }
      work.add(sequence.length(), sequence.pages);
    }
  }
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  // Compares the results with softmax(q k) v in double over the keys that each query sees.
  void check(std::int64_t shift = 0) const {
    for (std::size_t at = 0; at < sequences.size(); ++at) {
      const Sequence& sequence = *sequences[at];
      for (std::int64_t token = starts[at]; token < starts[at + 1]; ++token) {
        const std::int64_t position =
            sequence.length() - shift - (starts[at + 1] - starts[at]) + token - starts[at];
        const std::int64_t seen = work.spec.causal ? position + 1 : sequence.length();
        for (std::int64_t head = 0; head < kHeads; ++head) check_row(sequence, token, head, seen);
      }
    }
  }

  void check_row(const Sequence& sequence, std::int64_t token, std::int64_t head,
                 std::int64_t seen) const {
    const std::int64_t kv_head = head / (kHeads / kKvHeads);
    std::vector<double> expected(kValueDim);
    double sum = 0, weighed_scores = 0;
    for (std::int64_t k = 0; k < seen; ++k) {
      if (work.spec.window >= 0 && k < seen - 1 - work.spec.window) continue;
      double score = 0;
      for (std::int64_t d = 0; d < kDim; ++d) {
        score += static_cast<double>(query[(token * kHeads + head) * kDim + d]) *
                 sequence.keys[(k * kKvHeads + kv_head) * kDim + d];
      }
      const double weight = std::exp(score * kScale);
      sum += weight;
      weighed_scores += weight * score * kScale;
      for (std::int64_t d = 0; d < kValueDim; ++d) {
        expected[d] += weight * sequence.values[(k * kKvHeads + kv_head) * kValueDim + d];
      }
    }
    for (std::int64_t d = 0; d < kValueDim; ++d) {
      CHECK(output[(token * kHeads + head) * kValueDim + d] ==
            doctest::Approx(expected[d] / sum).epsilon(1e-4));
    }
    CHECK(log_sum_exp[token * kHeads + head] == doctest::Approx(std::log(sum)).epsilon(1e-4));
    if (entropy.empty()) return;
    CHECK(entropy[token * kHeads + head] ==
          doctest::Approx(std::log(sum) - weighed_scores / sum).epsilon(1e-4));
  }

  void want_entropy() {
    entropy.resize(log_sum_exp.size());
    work.entropy = tensor_of(entropy, work.log_sum_exp.shape);
  }

  // Asks for the weights of a sequence, after those before it.
  void want_weights(std::size_t at) {
    const std::int64_t tokens = starts[at + 1] - starts[at], keys = sequences[at]->length();
    std::vector<float>& place = weights.emplace_back(tokens * kHeads * keys, -1.0F);
    work.weights_of.push_back(static_cast<std::int64_t>(at));
    work.weights.push_back(tensor_of(place, {tokens, kHeads, keys}));
  }

  // Compares them with what gives the output: their sum over a query's keys is 1, and it is the sum
  // of their values, weighted.
  void check_weights() const {
    for (std::size_t wanted = 0; wanted < weights.size(); ++wanted) {
      const auto at = static_cast<std::size_t>(work.weights_of[wanted]);
      const Sequence& sequence = *sequences[at];
      const std::int64_t keys = sequence.length();
      for (std::int64_t row = 0; row < (starts[at + 1] - starts[at]) * kHeads; ++row) {
        const std::int64_t kv_head = row % kHeads / (kHeads / kKvHeads);
        const float* of_row = weights[wanted].data() + row * keys;
        for (std::int64_t d = 0; d < kValueDim; ++d) {
          double expected = 0;
          for (std::int64_t key_at = 0; key_at < keys; ++key_at) {
            expected += static_cast<double>(of_row[key_at]) *
                        sequence.values[(key_at * kKvHeads + kv_head) * kValueDim + d];
          }
          CHECK(output[(starts[at] * kHeads + row) * kValueDim + d] ==
                doctest::Approx(expected).epsilon(1e-4));
        }
        CHECK(std::accumulate(of_row, of_row + keys, 0.0) == doctest::Approx(1).epsilon(1e-5));
        const std::int64_t position = keys - (starts[at + 1] - starts[at]) + row / kHeads;
        for (std::int64_t key_at = position + 1; key_at < keys; ++key_at) {
          CHECK(of_row[key_at] == 0);
        }
      }
    }
  }

  void run() {
    PagedWork* one = &work;
    attend_paged_together(std::span(&one, 1), nullptr);
  }

  std::vector<Sequence*> sequences;
  std::vector<std::int64_t> starts{0}, parents;
  std::vector<float> query, key, value, output, log_sum_exp, entropy;
  std::deque<std::vector<float>> weights;  // of sequences, as asked for
  PagedWork work;
};

// A layer's graph, as far as it can be seen from outside: gives its hidden states back as output,
// and remembers what it was given.
class LayerGraph final : public Session {
 public:
  LayerGraph() {
    for (const std::string name : {"hidden_states", "positions", "starts", "lengths", "parents"}) {
      inputs_.push_back({name, DataType::kInt64, {-1}});
    }
  }
  const std::vector<Port>& inputs() const override { return inputs_; }
  const std::vector<Port>& outputs() const override { return outputs_; }
  bool any_heads() const override { return false; }
  void run(std::span<const Feed> feeds, std::span<Fetch> fetches, Stop*) override {
    ++runs;
    for (const Feed& feed : feeds) {
      if (feed.name == "positions") {
        const auto* values = reinterpret_cast<const std::int64_t*>(feed.tensor.data);
        positions.assign(values, values + feed.tensor.shape[0]);
      }
      if (feed.name != "hidden_states") continue;
      REQUIRE(fetches.size() == 1);
      REQUIRE(fetches[0].into.shape == feed.tensor.shape);
      std::memcpy(fetches[0].into.data, feed.tensor.data, feed.tensor.byte_size());
    }
  }
  std::unique_ptr<Stop> make_stop() override { return nullptr; }

  std::vector<std::int64_t> positions;
  int runs = 0;

 private:
  std::vector<Port> inputs_, outputs_{{"output", DataType::kFp32, {-1}}};
};

// Remembers what it was given as value, and gives nothing.
class ValueGraph final : public Session {
 public:
  const std::vector<Port>& inputs() const override { return inputs_; }
  const std::vector<Port>& outputs() const override { return outputs_; }
  bool any_heads() const override { return false; }
  void run(std::span<const Feed> feeds, std::span<Fetch>, Stop*) override {
    for (const Feed& feed : feeds) {
      if (feed.name == "value") value = feed.tensor;
    }
  }
  std::unique_ptr<Stop> make_stop() override { return nullptr; }

  Tensor value;

 private:
  std::vector<Port> inputs_{{"value", DataType::kFp32, {-1, kKvHeads, kValueDim}}}, outputs_;
};

// New tokens of two sequences, which have 10 and no keys before.
struct HiddenStep {
  HiddenStep(const Variant& variant, std::vector<std::int64_t> of_each, std::mt19937& random,
             std::vector<std::int64_t> tree = {})
      : starts(std::move(of_each)), parents(std::move(tree)) {
    const std::int64_t tokens = starts.back();
    hidden = normal(random, tokens * kHidden);
    output.resize(hidden.size());
    work.variant = &variant;
    work.query = {DataType::kFp32, {tokens, kHeads, kDim}, nullptr};
    work.hidden_states = tensor_of(hidden, {tokens, kHidden});
    work.output = tensor_of(output, {tokens, kHidden});
    work.starts = work.key_starts = starts;
    work.parents = parents;
    work.add(10 + starts[1], {});
    work.add(starts[2] - starts[1], {});
  }
  HiddenStep(const HiddenStep&) = delete;
  HiddenStep& operator=(const HiddenStep&) = delete;

  static constexpr std::int64_t kHidden = 6;
  std::vector<std::int64_t> starts, parents;
  std::vector<float> hidden, output;
  PagedWork work;
};

struct World {
  explicit World(std::int64_t spec_numbers = 7) {
    if (runtime) variant = &add_variant(model, "paged", paged_graph(runtime, spec_numbers));
  }

  std::shared_ptr<Runtime> runtime = test_runtime();
  Model model;
  const Variant* variant = nullptr;
  Cache cache;
  std::mt19937 random{std::random_device{}()};
};

}  // namespace

TEST_CASE("a layer of sessions sees all that was added before") {
  World world;
  if (!world.runtime) return;
  Sequence one, other;
  for (const auto& counts : std::vector<std::vector<std::int64_t>>{{5, 1}, {1, 1}, {2, 9}}) {
    Step step(*world.variant, world.cache, {&one, &other}, counts, world.random);
    step.run();
    step.check();
  }
}

TEST_CASE("works of one key give together what they give alone") {
  World world;
  if (!world.runtime) return;
  std::vector<Sequence> sequences(4);
  for (Sequence& sequence : sequences) {
    const std::int64_t tokens = 1 + static_cast<std::int64_t>(world.random() % 30);
    Step step(*world.variant, world.cache, {&sequence}, {tokens}, world.random);
    step.run();
  }
  Step first(*world.variant, world.cache, {&sequences[0], &sequences[1]}, {1, 3}, world.random);
  Step second(*world.variant, world.cache, {&sequences[2]}, {2}, world.random);
  Step third(*world.variant, world.cache, {&sequences[3]}, {4}, world.random);
  second.work.log_sum_exp = {};  // is not wanted
  // A tree: the others' tokens still follow one another.
  third.parents = {-1, 0, 1, 2};
  third.work.parents = third.parents;
  CHECK(batch_key(first.work) == batch_key(second.work));
  CHECK(batch_key(first.work) == batch_key(third.work));
  std::vector<PagedWork*> works{&first.work, &second.work, &third.work};
  attend_paged_together(works, nullptr);
  first.check();
  third.check();
  for (const float untouched : second.log_sum_exp) CHECK(untouched == 0);
  second.work.log_sum_exp = tensor_of(second.log_sum_exp, {2, kHeads});
  second.run();  // the same keys once more, to the same places
  second.check();
}

TEST_CASE("entropy is that of the works that want it, whatever numbers of a spec the graph takes") {
  for (const std::int64_t spec_numbers : {5, 6, 7}) {
    World world(spec_numbers);
    if (!world.runtime) return;
    std::vector<Sequence> sequences(2);
    Step first(*world.variant, world.cache, {&sequences[0]}, {3}, world.random);
    Step second(*world.variant, world.cache, {&sequences[1]}, {20}, world.random);
    first.want_entropy();
    std::vector<PagedWork*> works{&first.work, &second.work};
    attend_paged_together(works, nullptr);
    for (const Step* step : {&first, &second}) step->check();
    // Many rows alone, and few.
    second.want_entropy();
    for (Step* step : {&first, &second}) {
      step->run();
      step->check();
    }
  }
}

TEST_CASE("keys of a cross layer are as many as they like, and every query sees them") {
  World world;
  if (!world.runtime) return;
  PagedSpec cross;
  cross.causal = false;
  Sequence sequence;
  // Eleven keys, of which the first three tokens' queries are asked.
  Step step(*world.variant, world.cache, {&sequence}, {11}, world.random, cross);
  CHECK_FALSE(step.work.joinable());
  const std::vector<std::int64_t> key_starts = step.starts;
  step.starts = {0, 3};
  step.work.starts = step.starts;
  step.work.key_starts = key_starts;
  step.work.query.shape[0] = step.work.output.shape[0] = step.work.log_sum_exp.shape[0] = 3;
  step.run();
  step.check();
  // Later ones bring no keys, and can be joined.
  PagedWork later = step.work;
  later.key.data = later.value.data = nullptr;
  CHECK(later.joinable());
  std::ranges::fill(step.output, 0.0F);
  PagedWork* one = &later;
  attend_paged_together(std::span(&one, 1), nullptr);
  step.check();
}

TEST_CASE("layers that bring no keys are joined") {
  World world;
  if (!world.runtime) return;
  for (const bool causal : {true, false}) {
    PagedSpec spec;
    spec.causal = causal;
    std::vector<Sequence> sequences(2);
    Step first(*world.variant, world.cache, {&sequences[0]}, {6}, world.random, spec);
    Step second(*world.variant, world.cache, {&sequences[1]}, {3}, world.random, spec);
    std::vector<PagedWork*> works{&first.work, &second.work};
    for (Step* step : {&first, &second}) {
      step->run();
      step->work.key.data = step->work.value.data = nullptr;
      step->work.key.shape[0] = step->work.value.shape[0] = 0;
      std::ranges::fill(step->output, 0.0F);
    }
    CHECK(batch_key(first.work) == batch_key(second.work));
    CHECK(second.work.joinable());
    attend_paged_together(works, nullptr);
    for (const Step* step : {&first, &second}) step->check();
  }
}

TEST_CASE("joined latent layers have no values, of the dtype and shape that the graph takes") {
  std::mt19937 random{std::random_device{}()};
  Model model;
  auto made = std::make_unique<ValueGraph>();
  const ValueGraph& graph = *made;
  const Variant& variant = add_variant(model, "paged", std::move(made));
  Cache cache;
  PagedSpec latent;
  latent.latent = true;
  std::vector<Sequence> sequences(2);
  Step first(variant, cache, {&sequences[0]}, {2}, random, latent);
  Step second(variant, cache, {&sequences[1]}, {1}, random, latent);
  for (Step* step : {&first, &second}) {
    step->work.value = {DataType::kFp32, {0, kKvHeads, kValueDim}, nullptr};
  }
  std::vector<PagedWork*> works{&first.work, &second.work};
  attend_paged_together(works, nullptr);
  CHECK(graph.value.dtype == DataType::kFp32);
  CHECK(graph.value.shape == Shape{0, kKvHeads, kValueDim});
  CHECK(graph.value.data != nullptr);
}

TEST_CASE("weights are those of the sequences that are named, alone and together") {
  World world;
  if (!world.runtime) return;
  std::vector<Sequence> sequences(5);
  for (Sequence& sequence : sequences) {
    Step step(*world.variant, world.cache, {&sequence}, {9}, world.random);
    step.want_weights(0);
    step.run();
    step.check();
    step.check_weights();
  }
  Step first(*world.variant, world.cache, {&sequences[0], &sequences[1]}, {1, 3}, world.random);
  Step second(*world.variant, world.cache, {&sequences[2]}, {2}, world.random);
  Step third(*world.variant, world.cache, {&sequences[3], &sequences[4]}, {4, 2}, world.random);
  first.want_weights(1);
  third.want_weights(0);
  third.want_weights(1);
  CHECK(units(third.work) > units(second.work));
  CHECK(batch_key(first.work) == batch_key(second.work));
  std::vector<PagedWork*> works{&first.work, &second.work, &third.work};
  attend_paged_together(works, nullptr);
  for (const Step* step : {&first, &second, &third}) {
    step->check();
    step->check_weights();
  }
}

TEST_CASE("works of other layers, or of many tokens, have other keys") {
  World world;
  if (!world.runtime) return;
  Sequence sequence;
  Step few(*world.variant, world.cache, {&sequence}, {3}, world.random);
  Step many(*world.variant, world.cache, {&sequence}, {40}, world.random);
  CHECK(batch_key(few.work) != batch_key(many.work));
  CHECK(units(many.work) > 5 * units(few.work));
  CHECK(working_bytes(many.work) > working_bytes(few.work));
  PagedWork windowed = few.work;
  windowed.spec.window = 7;
  CHECK(batch_key(few.work) != batch_key(windowed));
  PagedWork typed = few.work;
  typed.spec.cache_type = 1;
  CHECK(batch_key(few.work) != batch_key(typed));
  std::vector<float> sinks(kHeads), others(kHeads);
  PagedWork sunk = few.work, alike = few.work, other = few.work;
  sunk.sinks = alike.sinks = tensor_of(sinks, {kHeads});
  other.sinks = tensor_of(others, {kHeads});
  CHECK(batch_key(few.work) != batch_key(sunk));
  CHECK(batch_key(alike) == batch_key(sunk));
  CHECK(batch_key(other) != batch_key(sunk));
}

TEST_CASE("hidden states are joined, each token told its position in its sequence") {
  std::mt19937 random{std::random_device{}()};
  Model model;
  auto made = std::make_unique<LayerGraph>();
  LayerGraph& graph = *made;
  const Variant& variant = add_variant(model, "paged", std::move(made));
  CHECK(takes_positions(variant));
  HiddenStep chains(variant, {0, 3, 5}, random);
  HiddenStep trees(variant, {0, 4, 5}, random, {-1, 0, 0, 2, -1});
  CHECK(batch_key(chains.work) == batch_key(trees.work));
  CHECK(chains.work.joinable());
  std::vector<PagedWork*> works{&chains.work, &trees.work};
  attend_paged_together(works, nullptr);
  CHECK(graph.runs == 1);
  CHECK(graph.positions == std::vector<std::int64_t>{10, 11, 12, 0, 1, 10, 11, 11, 12, 0});
  CHECK(chains.output == chains.hidden);
  CHECK(trees.output == trees.hidden);
  attend_paged_together(std::span(works).subspan(1), nullptr);
  CHECK(graph.positions == std::vector<std::int64_t>{10, 11, 11, 12, 0});
  PagedWork wider = chains.work;
  wider.hidden_states.shape[1] *= 100;
  CHECK(units(wider) > units(chains.work));
  CHECK(working_bytes(wider) > working_bytes(chains.work));
}

TEST_CASE("a model never chooses its paged variant for a request") {
  Model model;
  add_variant(model, "paged",
              std::make_unique<FakeSession>(std::vector<std::string>{"query", "key", "value"},
                                            std::vector<std::string>{"output"}));
  add_variant(model, "native",
              std::make_unique<FakeSession>(std::vector<std::string>{"query", "key", "value"},
                                            std::vector<std::string>{"output"}));
  model.picks = {{std::nullopt, {"paged", "native"}}};
  const std::array<std::string_view, 2> inputs{"query", "key"};
  const std::array<std::string_view, 1> outputs{"output"};
  CHECK(model.choose("", inputs, outputs, 1).name() == "native");
  CHECK(model.find(inputs, outputs)->name() == "native");
  CHECK(model.named("paged") != nullptr);
  CHECK_THROWS_WITH_AS(model.choose("paged", inputs, outputs, 1),
                       doctest::Contains("given 'paged'"), RequestError);
}
